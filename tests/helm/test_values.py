"""The chart's values: whatever may be said is said to somebody, and whatever is misspelt is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import helm_python
import jsonschema
import pytest
import yaml

from cluster.config import SluiceConfig
from cluster.config_file import keys, parse
from helm import generated, readme, schema
from helm.readme import CHART
from tests.support import chart
from tests.support.other_values import OtherValues

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
OTHERS = OtherValues(SCHEMA)
DEFAULTS = chart.defaults()
FILES = generated.files()
SECTIONS = {name: OTHERS.resolve(node) for name, node in SCHEMA["properties"].items()}
CONFIG = [path for path, _ in OTHERS.leaves(SECTIONS["config"])]
POOL_CONFIG = [path for path, _ in OTHERS.leaves(SCHEMA["$defs"]["PoolConfigPlace"])]

# Between the two, everything that can be switched on is on, and of two ways each is taken once.
MADE = {
    "pools": {"decode": None, "prefill": {"pods": 2, "maxPods": 9}},
    "apiKeys": {"lines": ["a " + 32 * "k"]},
    "clusterSecret": {"value": "s3cret"},
    "autoscaling": {"enabled": True},
    "gcsFaultTolerance": {"enabled": True, "passwordSecret": {"name": "redis"}},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
    "ingress": {"enabled": True, "tls": {"enabled": True, "certificate": "C", "key": "K"}},
    "model": {"init": {"enabled": True, "command": ["true"]}},
    "monitoring": {
        "podMonitor": {"enabled": True},
        "rules": {"enabled": True},
        "scrapeConfig": {"enabled": True, "apiKey": {"name": "scraper"}},
    },
    "config": {"traces": {"endpoint": "http://collector:4318/v1/traces"}},
    "networkPolicy": {"enabled": True},
    "pod": {"gpu": {"count": 1}, "rdma": {"count": 1}},
    "upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"},
    "wordsTls": {"existingSecret": "words"},
}
GIVEN = {
    **{key: MADE[key] for key in ("pools", "gcsFaultTolerance")},
    "apiKeys": {"existingSecret": "a"},
    "clusterSecret": {"existingSecret": "b"},
    "ingress": {"enabled": True, "tls": {"enabled": True, "existingSecret": "c"}},
}
# Dashboards are long: they are on by themselves.
BASES = {
    "made": MADE,
    "given": GIVEN,
    "dashboards": {"monitoring": {"dashboards": {"enabled": True}}},
}


def place(tree: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    first, *rest = path
    return {**tree, first: place(tree.get(first) or {}, tuple(rest), value) if rest else value}


def find(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = (tree or {}).get(name, {})
    return tree


def own_leaves() -> Iterator[tuple[str, ...]]:
    """Of the chart itself; `config` goes through as it is."""
    for name, node in SCHEMA["properties"].items():
        if name == "pools":
            (pool,) = node["patternProperties"].values()
            leaves = OTHERS.leaves(pool, ("pools", "prefill"))
            yield from (path for path, _ in leaves if path[2] != "config")
        elif name != "config":
            yield from (path for path, _ in OTHERS.leaves(node, (name,)))


def node_at(path: tuple[str, ...]) -> Mapping[str, Any]:
    node: Mapping[str, Any] = SCHEMA
    for name in path:
        node = OTHERS.resolve(node)
        inner = node.get("properties", {}).get(name)
        (node,) = [inner] if inner is not None else node["patternProperties"].values()
    return node


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Any) -> None:
    assert path.read_text() == FILES[path], "run python -m helm"


def test_no_object_takes_keys_that_it_does_not_name() -> None:
    def walk(node: Any, path: str) -> Iterator[str]:
        if isinstance(node, dict):
            if node.get("type") == "object" and "additionalProperties" not in node:
                yield path
            for name, each in node.items():
                yield from walk(each, f"{path}/{name}")

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert list(walk(SCHEMA, "")) == []
    tables = {name for name, node in SECTIONS.items() if "properties" not in node and node.get("type") == "object"}
    assert tables == {"pools", "labels"}


def test_every_key_of_sluice_is_a_value_or_the_charts_own() -> None:
    pools = {f"pools.*.{'.'.join(path)}" for path in POOL_CONFIG}
    said = {".".join(path) for path in CONFIG} | pools
    own = {key for key in keys() if any(key == each or key.startswith(each + ".") for each in schema.SET_BY_CHART)}
    assert said | own == set(keys()) and not own & said - pools
    for each in schema.SET_BY_CHART:
        assert any(key == each or key.startswith(each + ".") for key in keys()), f"there is no {each} any more"


def test_every_value_has_a_default_and_a_row() -> None:
    stated = {tuple(row.key.split(".")) for row in readme.rows((CHART / "values.yaml").read_text())}
    assert [path for path in own_leaves() if path not in stated and path[:2] != ("pools", "prefill")] == []
    defaults = DEFAULTS
    assert chart.refusal(defaults) is None
    assert {path for path in stated if find(defaults, path) == {} and path[-1] not in ("pod", "config")} <= {
        path for path in own_leaves() if OTHERS.resolve(node_at(path)).get("type") == "object"
    }


@cache
def rendered_without(name: str) -> str:
    return chart.render_text(BASES[name])


@pytest.mark.parametrize("path", list(own_leaves()), ids=".".join)
def test_every_value_changes_what_is_rendered(path: tuple[str, ...]) -> None:
    for name, base in BASES.items():
        now = find(base, path) or find(DEFAULTS, path)
        if path[:3] == ("pools", "prefill", "pod"):
            now = find(DEFAULTS, path[2:])
        changed = place(base, path, OTHERS.other(node_at(path), now))
        with suppress(helm_python.HelmRenderError):  # it contradicts another value of this base
            if rendered_without(name) != chart.render_text(changed):
                return
    pytest.fail(f"{'.'.join(path)} changes nothing")


def test_the_config_arrives_as_it_was_said() -> None:
    said: dict[str, Any] = {}
    for path, node in OTHERS.leaves(SECTIONS["config"]):
        said = place(said, path, OTHERS.other(node, find(DEFAULTS["config"], path) or None))
    pool: dict[str, Any] = {}
    for path, node in OTHERS.leaves(SCHEMA["$defs"]["PoolConfigPlace"]):
        pool = place(pool, path, OTHERS.other(node))
    values = {"config": said, "pools": {"decode": {"config": pool}}, "pod": {"gpu": {"count": 99}}}
    rendered = chart.render(place(values, ("upgrade", "clusterDeletionDelaySeconds"), 999))
    told = chart.serve_config(rendered)["applications"][0]["args"]["config_inline"]
    assert told["pools"] == {"decode": pool, "prefill": {"workers": 1}}
    assert [path for path in CONFIG if find(told, path) != find(said, path)] == []
    assert said.keys() | {"pools"} == told.keys() == SluiceConfig.model_fields.keys() - {"name"}


def test_numbers_keep_their_digits() -> None:
    said = {"kv": {"memory_bytes": 68719476736, "memory_fraction": 0.123456789}, "model": {"dummy_seed": 2**40 + 1}}
    values = {"config": {**said, "controller": {"check_s": 0.25}}, "upgrade": {"clusterDeletionDelaySeconds": 999}}
    told = chart.serve_config(chart.render(values))["applications"][0]["args"]["config_inline"]
    assert told["kv"] == said["kv"] and told["model"]["dummy_seed"] == 2**40 + 1
    assert parse({**told, "pools": {"prefill": {}, "decode": {}}}).controller.check_s == 0.25


# Dotted key = value, and what of it the refusal must name.
REFUSED = """
imgae={}                                            imgae
nameOverride=Big                                    nameOverride
nameOverride=ends-                                  nameOverride
labels=[a]                                          labels
labels.a=1                                          labels/a
image.repo=x                                        repo
image.tag=-x                                        image/tag
image.tag=1.0                                       image/tag
image.pullPolicy=Sometimes                          image/pullPolicy
image.pullSecrets=[Bad_Name]                        image/pullSecrets/0
ray.version=2.60                                    ray/version
ray.authentication=none                             ray/authentication
config.name=other                                   name
config.pools={}                                     pools
config.model.path=/m                                path
config.words.host=10.0.0.1                          host
config.http.api_keys_file=/k                        api_keys_file
config.http.prot=1                                  prot
config.http.port=70000                              config/http/port
config.router.policy=random                         config/router/policy
config.kv.memory_fraction=1.5                       config/kv/memory_fraction
config.kv.block_size=0                              config/kv/block_size
config.scheduler.chunk_token=1                      chunk_token
config.log.level=loud                               config/log/level
configDelivery=mail                                 configDelivery
model.path=relative                                 model/path
model.pvc.claim=x                                   claim
model.init.enabled="yes"                            model/init/enabled
model.init.command=sh                               model/init/command
model.init.env=[{name: A}]                          value
model.init.sizeLimit=20 GB                          model/init/sizeLimit
pools.Big={}                                        Big
pools.a-b={}                                        a-b
pools.prefill.replicas=1                            replicas
pools.prefill.pods=-1                               pools/prefill/pods
pools.prefill.pods=two                              pools/prefill/pods
pools.prefill.config.worker=2                       worker
pools.prefill.config.workers=-1                     pools/prefill/config/workers
pools.prefill.config.roles=[prefil]                 pools/prefill/config/roles/0
pools.prefill.pod.cpus="1"                          cpus
pods={}                                             pods
pod.cpu=4                                           pod/cpu
pod.memory=16 GB                                    pod/memory
pod.gpu.resource=gpu                                pod/gpu/resource
pod.gpu.count=-1                                    pod/gpu/count
pod.tolerations=[{keys: a}]                         keys
pod.tolerations=[{effect: Never}]                   pod/tolerations/0/effect
pod.nodeAffinity=[{key: a, operator: Equals}]       pod/nodeAffinity/0/operator
pod.spread=[{topologyKey: a}]                       maxSkew
pod.hostNetwork=1                                   pod/hostNetwork
head.replicas=2                                     replicas
clusterSecret.secret=x                              secret
wordsTls.secret=x                                   secret
apiKeys.lines=one                                   apiKeys/lines
probes.live.stalledSeconds=0                        probes/live/stalledSeconds
drain.marginSeconds=1                               drain/marginSeconds
podDisruptionBudget.maxUnavailable=1                maxUnavailable
networkPolicy.egressCidrs=[10.0.0.0]                networkPolicy/egressCidrs/0
networkPolicy.collectorNamespaces=monitoring        networkPolicy/collectorNamespaces
networkPolicy.collectorPort=65536                   networkPolicy/collectorPort
config.traces.endpoint=collector:4318               config/traces/endpoint
config.traces.sample_rate=1.5                       config/traces/sample_rate
monitoring.scrapeConfig.interval=15                 monitoring/scrapeConfig/interval
monitoring.rules.runbookUrl=docs                    monitoring/rules/runbookUrl
ingress.tls.secretName=x                            secretName
ingress.path=v1                                     ingress/path
httpRoute.parentRefs=[{namespace: a}]               name
autoscaling.upscalingMode=Fast                      autoscaling/upscalingMode
gcsFaultTolerance.redisAddress=redis                gcsFaultTolerance/redisAddress
upgrade.strategy=RollingUpdate                      upgrade/strategy
upgrade.stepSizePercent=101                         upgrade/stepSizePercent
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.partition(" ")[0])
def test_a_mistake_is_refused_by_name(line: str) -> None:
    mistake, named = line.rsplit(maxsplit=1)
    key, _, value = mistake.strip().partition("=")
    said = chart.refusal(place({}, tuple(key.split(".")), yaml.safe_load(value)))
    assert said is not None and named in said.replace("'", "/") + said
    assert said.count("\n- ") == 1, "it is the only mistake"
