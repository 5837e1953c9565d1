"""What the chart renders: held against the schemas of Kubernetes and KubeRay, and against what sluice itself reads."""

from __future__ import annotations

from typing import Any

import helm_python
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import Role, SluiceConfig
from cluster.config_file import parse
from deploy.app import AppArgs
from helm.crds import CRDS
from helm.readme import CHART
from tests.helm import golden
from tests.support import chart

ALL: dict[str, Any] = {name: chart.recipe(name) for name in chart.RECIPES} | {"defaults": {}}
EVERYTHING = {
    **ALL["multi-node"],
    "apiKeys": {"lines": ["a sha256:" + 64 * "0", "b " + 32 * "k"]},
    "clusterSecret": {"value": "s3cret"},
    "autoscaling": {"enabled": True},
    "ingress": {
        "enabled": True,
        "host": "llm.example.com",
        "className": "nginx",
        "annotations": {"a": "b"},
        "tls": {"enabled": True, "certificate": "C", "key": "K"},
    },
    "image": {"pullSecrets": ["registry"]},
    "model": {"init": {"enabled": True, "command": ["true"], "env": [{"name": "A", "value": "b"}]}},
}


def config_of(rendered: list[chart.Object]) -> SluiceConfig:
    """As `deploy.app:build` reads it."""
    (application,) = chart.serve_config(rendered)["applications"]
    args = AppArgs.model_validate(application["args"])
    if args.config is None:
        return args.read()
    (file,) = [each for each in chart.of_kind(rendered, "ConfigMap") if "sluice.yaml" in each["data"]]
    assert args.config == "/etc/sluice/sluice.yaml"
    return parse(yaml.safe_load(file["data"]["sluice.yaml"]))


@pytest.mark.parametrize("name", ALL)
def test_helm_finds_nothing_to_complain_of(name: str) -> None:
    report = helm_python.lint(CHART, ALL[name], strict=True)
    assert (report["messages"], report["errors"], report["total_charts_linted"]) == ([], [], 1)


@pytest.mark.parametrize("values", [*ALL.values(), EVERYTHING], ids=[*ALL, "everything"])
def test_the_schemas_of_all_resources_take_what_is_rendered(values: dict[str, Any]) -> None:
    rendered = chart.render(values)
    assert list(chart.complaints(rendered)) == []
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered]
    assert len(names) == len(set(names))
    if values is EVERYTHING:
        assert CRDS.keys() <= {kind for kind, _ in names}, "each is checked somewhere"


def test_a_wrong_key_would_be_complained_of() -> None:
    rendered = chart.render(EVERYTHING)
    chart.ray_service(rendered)["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 1
    chart.pod_templates(rendered)["head"]["spec"]["tolerations"] = {}
    (policy,) = chart.of_kind(rendered, "NetworkPolicy")
    policy["spec"]["egres"] = []
    (route,) = chart.of_kind(rendered, "HTTPRoute")
    route["spec"]["rules"][0]["timeouts"]["request"] = "soon"
    (config,) = chart.of_kind(rendered, "ScrapeConfig")
    config["spec"]["httpSDConfigs"][0]["uri"] = "http://elsewhere"
    (monitor,) = chart.of_kind(rendered, "PodMonitor")
    del monitor["spec"]["selector"]
    (rules,) = chart.of_kind(rendered, "PrometheusRule")
    rules["spec"]["groups"][0]["rules"][0]["for"] = "a while"
    said = "\n".join(chart.complaints(rendered))
    for complaint in (
        "'replica' was unexpected",
        "'egres' was unexpected",
        "template.spec.toleration",
        "HTTPRoute $.rules[0].timeouts.request: 'soon' does not match",
        "ScrapeConfig $.httpSDConfigs[0]: Additional properties are not allowed ('uri' was unexpected)",
        "PodMonitor $: 'selector' is a required property",
        "PrometheusRule $.groups[0].rules[0].for: 'a while' does not match",
    ):
        assert complaint in said


@pytest.mark.parametrize("name", ALL)
def test_serve_and_sluice_take_what_is_deployed(name: str) -> None:
    rendered = chart.render(ALL[name])
    schema = ServeDeploySchema.model_validate(chart.serve_config(rendered))
    (application,) = schema.applications
    assert (application.name, application.import_path, application.route_prefix) == ("sluice", "deploy.app:build", "/")
    config = config_of(rendered)
    pods = sum(group["replicas"] for group in chart.ray_service(rendered)["rayClusterConfig"]["workerGroupSpecs"])
    assert (config.http.replicas, schema.http_options.port) == (pods, config.http.port)
    assert config.model.path == "/model" and config.words.host == "0.0.0.0"
    for template in chart.pod_templates(rendered).values():
        environment = {each["name"]: each for each in template["spec"]["containers"][0]["env"]}
        assert environment["RAY_SERVE_ENABLE_HA_PROXY"]["value"] == "1"
        assert environment[config.words.secret_env]["valueFrom"]["secretKeyRef"]["key"] == "cluster-secret"
        assert (config.http.api_keys_env is None) == ("SLUICE_API_KEYS" not in environment)


@pytest.mark.parametrize("name", ALL)
def test_the_pods_have_room_for_the_workers(name: str) -> None:
    rendered = chart.render(ALL[name])
    config = config_of(rendered)
    cluster = chart.ray_service(rendered)["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    cores = sum(int(group["rayStartParams"]["num-cpus"]) * group["replicas"] for group in groups)
    gpus = sum(int(group["rayStartParams"]["num-gpus"]) * group["replicas"] for group in groups)
    pods = sum(group["replicas"] for group in groups)
    assert cores == sum(pool.workers * pool.cpus for pool in config.pools.values()) + pods  # one for the ingress, each
    assert gpus == sum(pool.workers * pool.gpus for pool in config.pools.values())
    assert cluster["headGroupSpec"]["rayStartParams"].items() >= {"num-cpus": "0", "num-gpus": "0"}.items()
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) >= int(group["rayStartParams"]["num-cpus"])
        assert limits.get("nvidia.com/gpu", 0) == int(group["rayStartParams"]["num-gpus"])


def test_a_pod_that_goes_may_end_what_it_began() -> None:
    slow = {"config": {"http": {"request_timeout_s": 900, "drain_s": 1200.5}, "controller": {"drain_timeout_s": 30}}}
    rendered = chart.render({**slow, "upgrade": {"clusterDeletionDelaySeconds": 1300}})
    for group, template in chart.pod_templates(rendered).items():
        if group == "head":
            continue
        command = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[-2:] == ["--deadline-s", "1201"]
        assert template["spec"]["terminationGracePeriodSeconds"] == 1261


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pools": {"prefill": {"config": {"gpus": 2}}}}, "pools.prefill.pod.gpu.count: 0, but"),
        ({"autoscaling": {"enabled": True}, "pools": {"decode": {"pods": 3}}}, "pools.decode.maxPods: 1 is under"),
        ({"pools": {"prefill": None, "decode": None}}, "pools: none has pods"),
        ({"pools": {"prefill": {"pods": 0}, "decode": {"pods": 0}}}, "pools: none has pods"),
        ({"model": {"pvc": {"existingClaim": ""}}}, "model.pvc.existingClaim: empty"),
        ({"model": {"init": {"enabled": True}}}, "model.init.command: empty"),
        ({"clusterSecret": {"existingSecret": "a", "value": "b"}}, "clusterSecret.value: "),
        ({"apiKeys": {"existingSecret": "a", "lines": ["b"]}}, "apiKeys.lines: "),
        ({"ingress": {"enabled": True, "tls": {"enabled": True}}}, "ingress.tls.certificate: empty"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: empty"),
        ({"upgrade": {"clusterDeletionDelaySeconds": 10}}, "upgrade.clusterDeletionDelaySeconds: 10 is under"),
        ({"apiKeys": {"lines": ["b"]}, "monitoring": {"scrapeConfig": {"enabled": True}}}, "apiKey.name: empty"),
        ({"networkPolicy": {"collectorNamespaces": ["a"]}}, "networkPolicy.collectorNamespaces, "),
        ({"networkPolicy": {"collectorPort": 1}}, "networkPolicy.collectorPort: no traces are sent; set config.traces"),
        ({"nameOverride": ""}, "nameOverride: "),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    release = "a" * 41 if said == "nameOverride: " else "llm"
    with pytest.raises(helm_python.HelmRenderError, match=said.replace(".", r"\.")):
        chart.render_text(values, release=release)


def test_only_what_the_planes_need_passes_the_network_policy() -> None:
    config = EVERYTHING["config"]
    said = {"words": {"port_min": 25000, "port_max": 25099}, "http": {**config["http"], "port": 8100}}
    values = {**EVERYTHING, "config": {**config, **said}}
    rendered = chart.render(values)
    config = config_of(rendered)
    (policy,) = chart.of_kind(rendered, "NetworkPolicy")
    pods = policy["spec"]["podSelector"]
    inside = next(rule for rule in policy["spec"]["ingress"] if {"podSelector": pods} in rule.get("from", []))
    ports = [(each["port"], each.get("endPort", each["port"])) for each in inside["ports"]]
    assert (config.words.port_min, config.words.port_max) == (25000, 25099) and (25000, 25099) in ports

    cluster = chart.ray_service(rendered)["rayClusterConfig"]
    spoken = {config.http.port}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spoken |= {int(value) for name, value in group["rayStartParams"].items() if name.endswith("port")}
    assert [port for port in sorted(spoken) if not any(low <= port <= high for low, high in ports)] == []
    outside = [rule for rule in policy["spec"]["ingress"] if rule is not inside]
    assert all("from" in rule for rule in outside), "clientNamespaces are named, so no rule is for everyone"
    for template in chart.pod_templates(rendered).values():
        assert template["metadata"]["labels"].items() >= pods["matchLabels"].items()
    open_ports = {each["port"] for rule in outside for each in rule["ports"]}
    assert open_ports == {8100, 8265, 52365, 8080, 25000}


@pytest.mark.parametrize(
    ("endpoint", "said", "port"),
    [
        ("http://collector:4318/v1/traces", 0, 4318),
        ("http://collector.monitoring.svc/v1/traces", 0, 80),
        ("https://collector.example.com/v1/traces", 0, 443),
        ("http://[fd00::17]:4318/v1/traces", 0, 4318),
        ("http://[fd00::17]/v1/traces", 0, 80),
        ("http://10.0.0.7", 4317, 4317),
    ],
)
def test_traces_reach_their_collector_and_nothing_else(endpoint: str, said: int, port: int) -> None:
    """The port of its pods; a NetworkPolicy is asked after the Service has been resolved."""

    def egress(config: dict[str, Any], policy: dict[str, Any]) -> list[Any]:
        (made,) = chart.of_kind(chart.render({"config": config, "networkPolicy": policy}), "NetworkPolicy")
        return made["spec"]["egress"]

    traces = {"traces": {"endpoint": endpoint}}
    without = egress({}, {})
    (anywhere,) = [rule for rule in egress(traces, {"collectorPort": said}) if rule not in without]
    assert anywhere == {"ports": [{"port": port}]}
    named = {"collectorPort": said, "collectorNamespaces": ["monitoring", "otel"]}
    (there,) = [rule for rule in egress(traces, named) if rule not in without]
    (where,) = there.pop("to")
    assert there == anywhere and where["namespaceSelector"]["matchExpressions"][0]["values"] == ["monitoring", "otel"]


def test_budgets_and_selectors_name_pods_that_are_there() -> None:
    rendered = chart.render(EVERYTHING)
    labels = [template["metadata"]["labels"] for template in chart.pod_templates(rendered).values()]
    budgets = chart.of_kind(rendered, "PodDisruptionBudget")
    assert {each["metadata"]["name"]: each["spec"]["minAvailable"] for each in budgets} == {
        "llm-decode": 4,
        "llm-prefill": 2,
    }
    for each in budgets:
        wanted = each["spec"]["selector"]["matchLabels"].items()
        assert [group["sluice/pool"] for group in labels if group.items() >= wanted] == [
            each["metadata"]["name"].removeprefix("llm-")
        ]
    (monitor,) = chart.of_kind(rendered, "PodMonitor")
    assert all(group.items() >= monitor["spec"]["selector"]["matchLabels"].items() for group in labels)


def test_a_change_of_config_is_reconciled_inline_and_makes_new_pods_as_a_file() -> None:
    def templates(delivery: str, chunk_tokens: int) -> tuple[str, str]:
        values = {"configDelivery": delivery, "config": {"scheduler": {"chunk_tokens": chunk_tokens}}}
        rendered = chart.render(values)
        return str(chart.pod_templates(rendered)), str(chart.serve_config(rendered))

    (pods, serve), (pods_after, serve_after) = templates("inline", 64), templates("inline", 128)
    assert pods == pods_after and serve != serve_after
    (pods, serve), (pods_after, serve_after) = templates("file", 64), templates("file", 128)
    assert pods != pods_after and serve == serve_after


def test_the_secret_is_drawn_once_for_each_release() -> None:
    def secret() -> str:
        (made,) = chart.of_kind(chart.objects(chart.render_text({"clusterSecret": {}})), "Secret")
        return made["data"]["cluster-secret"]

    first, second = secret(), secret()
    assert first != second and min(len(first), len(second)) == 64


def test_the_default_config_of_the_chart_is_that_of_sluice() -> None:
    """The chart reads these keys, so it says them; it must not thereby change them."""
    said = chart.defaults()["config"]
    mine = SluiceConfig.model_validate({"model": {"path": "/m"}}).model_dump(mode="json")
    assert {name: {key: mine[name][key] for key in section} for name, section in said.items()} == said
    assert set(chart.defaults()["pools"]) == {Role.PREFILL, Role.DECODE}


def test_what_the_cpu_recipe_renders_is_as_it_was() -> None:
    assert golden.PATH.read_text() == golden.text(), "look at the difference, then run python -m tests.helm.golden"
