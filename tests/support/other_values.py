"""For a JSON schema: its leaves, and for each a value that it allows and that is another one than now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import jsonschema

Schema = Mapping[str, Any]

# One of them fits every pattern of the chart's.
_TEXTS: Final = (
    "other", "/other", "9Gi", "example.com/other", "9.9.9", "7m", "10.9.0.0/16", "other:1", "https://other.example",
)  # fmt: skip


class OtherValues:
    """`root`: a schema with `$defs`, as pydantic writes it."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def leaves(self, node: Schema, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Schema]]:
        """Everything that is no object with named keys. A table with a pattern for its keys is skipped."""
        node = self.resolve(node)
        if "properties" in node:
            for name, each in node["properties"].items():
                yield from self.leaves(each, (*path, name))
        elif "patternProperties" not in node:
            yield path, node

    def resolve(self, node: Schema) -> Schema:
        while "$ref" in node:
            node = self._root["$defs"][node["$ref"].rpartition("/")[2]]
        return node

    def other(self, node: Schema, now: object = None) -> object:
        for candidate in self._candidates(self.resolve(node), now):
            if candidate != now and self._fits(candidate, node):
                return candidate
        raise AssertionError(f"no value but {now!r} fits {dict(node)}")

    def _fits(self, value: Any, node: Schema) -> bool:
        whole = {**node, "$defs": self._root["$defs"]}
        return jsonschema.Draft202012Validator(whole).is_valid(value)

    def _candidates(self, node: Schema, now: object) -> Iterator[object]:
        for each in node.get("anyOf", ()):
            yield from self._candidates(self.resolve(each), now)
        yield from node.get("enum", ())
        if "const" in node:
            yield node["const"]
        match node.get("type"):
            case "boolean":
                yield not now
            case "integer" | "number":
                yield from ((now + 1 if isinstance(now, int | float) else 7), 1, 2, 0.5)
            case "string":
                yield from _TEXTS
            case "array":
                yield [self.other(node["items"])]
            case "object" if "properties" in node:
                yield {name: self.other(each) for name, each in node["properties"].items()}
            case "object":
                yield {"other": "value"}
            case _:
                return
