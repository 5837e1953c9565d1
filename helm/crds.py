"""The part of other projects' resources that the chart is checked against: `python -m helm.crds KIND CRD.yaml`.

`CRD.yaml` is the project's own, as `Crd.source` names it (all Apache-2.0). Of the version that the chart writes the
types, enumerations, bounds and required keys stay; descriptions go, as does what Kubernetes' own schemas describe or
what the chart never writes. Keys that are not named are refused, though the API server would drop them in silence.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import yaml

from helm.schema import Json, Tree, section

FOLDER: Final = Path(__file__).parents[1] / "tests" / "fixtures" / "crds"
_KEPT: Final = (
    "type",
    "enum",
    "required",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "pattern",
)


@dataclass(frozen=True, slots=True)
class Crd:
    source: str
    version: str
    elsewhere: str = "(?!)"  # pattern of keys whose values are not looked into


_PROMETHEUS: Final = "prometheus-operator/prometheus-operator"
CRDS: Final[Mapping[str, Crd]] = MappingProxyType(
    {
        "RayService": Crd("ray-project/kuberay", "v1", "template|serveService|headService"),
        "PodMonitor": Crd(_PROMETHEUS, "v1"),
        "PrometheusRule": Crd(_PROMETHEUS, "v1"),
        "ScrapeConfig": Crd(_PROMETHEUS, "v1alpha1", "(?!http).*SDConfigs"),
        "HTTPRoute": Crd("kubernetes-sigs/gateway-api", "v1", "filters|matches"),
    }
)


def reduce(kind: str, crd: Tree) -> Tree:
    """The schema of `spec`."""
    wanted = CRDS[kind]
    versions = section(crd, "spec")["versions"]
    assert isinstance(versions, list)
    version = next(each for each in versions if isinstance(each, dict) and each["name"] == wanted.version)
    spec = section(section(section(section(version, "schema"), "openAPIV3Schema"), "properties"), "spec")
    source = f"{kind} {wanted.version} of {wanted.source} (Apache-2.0), reduced by helm/crds.py"
    return {"$comment": source, **_strict(spec, wanted.elsewhere)}


def _strict(node: Tree, elsewhere: str) -> Tree:
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict: Tree = {key: node[key] for key in _KEPT if key in node}
    if "properties" in node:
        properties: Tree = {name: _child(name, each, elsewhere) for name, each in section(node, "properties").items()}
        strict |= {"properties": properties, "additionalProperties": False}
    elif isinstance(node.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(section(node, "additionalProperties"), elsewhere)
    if "items" in node:
        strict["items"] = _strict(section(node, "items"), elsewhere)
    return strict


def _child(name: str, node: Json, elsewhere: str) -> Tree:
    assert isinstance(node, dict)
    return {"type": "object"} if re.fullmatch(elsewhere, name) else _strict(node, elsewhere)


if __name__ == "__main__":
    kind, path = sys.argv[1:]
    loaded = yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)
    (FOLDER / f"{kind}.json").write_text(json.dumps(reduce(kind, loaded), separators=(",", ":")) + "\n")
