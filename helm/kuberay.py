"""The part of KubeRay's RayService that the chart is checked against: `python -m helm.kuberay CRD.yaml SCHEMA.json`.

`CRD.yaml` is `ray.io_rayservices.yaml` of ray-project/kuberay's operator chart (Apache-2.0). Of version v1 the types,
enumerations, bounds and required keys stay; descriptions go, as do pod templates and Services, which Kubernetes' own
schemas describe. Keys that are not named are refused, though the API server would drop them in silence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import yaml

from helm.schema import Json, Tree, section

_KEPT: Final = ("type", "enum", "required", "minimum", "maximum", "minLength", "pattern")
_ELSEWHERE: Final = ("template", "serveService", "headService")


def reduce(crd: Tree) -> Tree:
    versions = section(crd, "spec")["versions"]
    assert isinstance(versions, list)
    version = next(each for each in versions if isinstance(each, dict) and each["name"] == "v1")
    spec = section(section(section(section(version, "schema"), "openAPIV3Schema"), "properties"), "spec")
    source = "RayService v1 of ray-project/kuberay (Apache-2.0), reduced by helm/kuberay.py"
    return {"$comment": source, **_strict(spec)}


def _strict(node: Tree) -> Tree:
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict: Tree = {key: node[key] for key in _KEPT if key in node}
    if "properties" in node:
        properties: Tree = {name: _child(name, each) for name, each in section(node, "properties").items()}
        strict |= {"properties": properties, "additionalProperties": False}
    elif isinstance(node.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(section(node, "additionalProperties"))
    if "items" in node:
        strict["items"] = _strict(section(node, "items"))
    return strict


def _child(name: str, node: Json) -> Tree:
    assert isinstance(node, dict)
    return {"type": "object"} if name in _ELSEWHERE else _strict(node)


if __name__ == "__main__":
    loaded = yaml.load(Path(sys.argv[1]).read_text(), Loader=yaml.CSafeLoader)
    Path(sys.argv[2]).write_text(json.dumps(reduce(loaded), separators=(",", ":")) + "\n")
