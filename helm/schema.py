"""`values.schema.json`: the types of `helm.values` with what `cluster.config` takes in their midst."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Final, TypeAlias

from pydantic import BaseModel

from cluster.config import PoolConfig, SluiceConfig
from helm.values import ITEM, Pod, Values

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
Tree: TypeAlias = dict[str, Json]

# The chart says these itself: from the pod, from its other values, or not at all where secrets are mounted.
SET_BY_CHART: Final = (
    "name",
    "pools",
    "model.path",
    "words.host",
    "words.secret_env",
    "words.tls",
    "http.host",
    "http.api_keys_file",
    "http.api_keys_env",
)


def values_schema() -> Tree:
    """Draft 2020-12. Nothing is required, as users give a part of the values, and nothing unnamed is allowed."""
    root = _plain(Values)
    definitions = section(root, "$defs")
    for place, model in (("PoolConfigPlace", PoolConfig), ("ConfigPlace", SluiceConfig)):
        inner = _plain(model)
        others = inner.pop("$defs", {})
        assert isinstance(others, dict)
        assert all(definitions.get(name, other) == other for name, other in others.items()), "two types of one name"
        definitions.update(others)
        definitions[place] = inner
    for key in SET_BY_CHART:
        _remove(definitions, key)
    definitions["PodOverride"] = {**section(definitions, Pod.__name__)}
    definitions.pop("PoolConfig", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Values of the chart sluice", **root}


def text() -> str:
    return json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n"


def section(tree: Tree, key: str) -> Tree:
    inner = tree[key]
    assert isinstance(inner, dict), key
    return inner


def _plain(model: type[BaseModel]) -> Tree:
    tree = deepcopy(model.model_json_schema())
    _tidy(tree)
    return tree


def _tidy(node: Json) -> None:
    """Takes out titles, descriptions of objects, and what is required of sections. Mutates `node`."""
    if isinstance(node, list):
        for each in node:
            _tidy(each)
        return
    if not isinstance(node, dict):
        return
    if isinstance(node.get("title"), str):
        del node["title"]
    if isinstance(node.get("description"), str) and "properties" in node:
        del node["description"]
    if not node.pop(ITEM, False) and node.get("type") == "object" and isinstance(node.get("required"), list):
        del node["required"]
    if "patternProperties" in node:
        node["additionalProperties"] = False
    for each in node.values():
        _tidy(each)


def _remove(definitions: Tree, key: str) -> None:
    """Takes a dotted key out of the schema of `config`. Mutates `definitions`."""
    node = section(definitions, "ConfigPlace")
    *sections, last = key.split(".")
    for name in sections:
        reference = section(section(node, "properties"), name)["$ref"]
        assert isinstance(reference, str)
        node = section(definitions, reference.rpartition("/")[2])
    del section(node, "properties")[last]
