"""The chart through Helm's own engine: what it renders, as plain objects; what its schema refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

import helm_python
import jsonschema
import kubernetes_validate
import yaml

from helm.crds import CRDS, FOLDER
from helm.readme import CHART

Object: TypeAlias = dict[str, Any]
RECIPES = ("cpu", "h200", "multi-node")
KUBERNETES = ("1.27", "1.37")  # the oldest that the chart takes, the newest whose schemas are there


class _Loader(yaml.CSafeLoader):
    """YAML would silently take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {keys}"
        return super().construct_mapping(node, deep=deep)


def recipe(name: str) -> Object:
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())


def defaults() -> Object:
    return yaml.load((CHART / "values.yaml").read_text(), Loader=_Loader)  # a SafeLoader


@cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def render_text(values: Mapping[str, Any], *, namespace: str = "serving", release: str = "llm") -> str:
    """Everything, in order of the templates' names. The drawn secret is a given one, unless `values` say more."""
    secret: Object = values.get("clusterSecret", {"value": "of a test"})
    rendered = _chart().render({**values, "clusterSecret": secret}, name=release, namespace=namespace)
    return "\n---\n".join(text for _, text in sorted(rendered.items()) if text.strip())


def objects(text: str) -> list[Object]:
    return [each for each in yaml.load_all(text, Loader=_Loader) if each]  # a SafeLoader


def render(values: Mapping[str, Any]) -> list[Object]:
    return objects(render_text(values))


def of_kind(rendered: Iterable[Object], kind: str) -> list[Object]:
    return [each for each in rendered if each["kind"] == kind]


def ray_service(rendered: Iterable[Object]) -> Object:
    (service,) = of_kind(rendered, "RayService")
    return service["spec"]


def pod_templates(rendered: Iterable[Object]) -> dict[str, Object]:
    """By group; the head's under `head`."""
    cluster = ray_service(rendered)["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def serve_config(rendered: Iterable[Object]) -> Object:
    return yaml.safe_load(ray_service(rendered)["serveConfigV2"])


def refusal(values: Mapping[str, Any]) -> str | None:
    """What the schema says of `values`; None: they pass."""
    try:
        _chart().validate_schema(dict(values))
    except helm_python.HelmValuesError as error:
        return str(error)
    return None


def complaints(rendered: Iterable[Object]) -> Iterator[str]:
    """What the schemas of Kubernetes and of the resources that others define have against them, all of them strict."""
    for each in rendered:
        if each["kind"] in CRDS:
            yield from _of_crd(each)
        else:
            yield from _of_kubernetes(each)
        if each["kind"] == "RayService":
            for name, template in pod_templates([each]).items():
                pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
                yield from _of_kubernetes(pod)


def _of_kubernetes(each: Object) -> Iterator[str]:
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{version} {each['kind']} {'.'.join(map(str, error.path))}: {error.message}"


def _of_crd(each: Object) -> Iterator[str]:
    kind, version = each["kind"], each["apiVersion"].partition("/")[2]
    if version != CRDS[kind].version:
        yield f"{kind}: version {version}, of which there is no schema"
    schema = json.loads((FOLDER / f"{kind}.json").read_text())
    for error in jsonschema.Draft202012Validator(schema).iter_errors(each["spec"]):
        yield f"{kind} {error.json_path}: {error.message}"
