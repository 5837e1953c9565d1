"""Random JSON schemas whose every text is short, for models that draw at random."""

from __future__ import annotations

from random import Random

Schema = dict[str, object]

_NAMES = ("a", "b", "name", "ü", 'q"uote', "x y", "z/1", "back\\slash")
_PATTERNS = ("^[a-f]{2,4}$", "^(ab|c){0,3}d$", "^[0-9]{3}-[0-9]{2}$", "^(é|ß)$")
_FORMATS = ("date", "uuid", "ipv4", "time")
_NODE: Schema = {
    "type": "object",
    "properties": {"value": {"enum": [0, 1]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}


def random_schemas(count: int, seed: int) -> list[Schema]:
    """The same ones for the same seed; no two are equal."""
    random = Random(seed)
    found: list[Schema] = []
    while len(found) < count:
        schema = {**_schema(random, depth=3), "$defs": {"node": _NODE}}
        if schema not in found:
            found.append(schema)
    return found


def _schema(random: Random, depth: int) -> Schema:
    if depth == 0 or random.random() < 0.3:
        return _scalar(random)
    match random.randrange(3):
        case 0:
            names = random.sample(_NAMES, random.randint(0, 3))
            return {
                "type": "object",
                "properties": {name: _schema(random, depth - 1) for name in names},
                "required": [name for name in names if random.random() < 0.5],
                "additionalProperties": False,
            }
        case 1:
            fewest = random.randint(0, 2)
            items = _schema(random, depth - 1)
            return {"type": "array", "items": items, "minItems": fewest, "maxItems": fewest + random.randint(0, 1)}
        case _:
            return {"anyOf": [_schema(random, depth - 1) for _ in range(random.randint(1, 3))]}


def _scalar(random: Random) -> Schema:
    low = random.randint(-1000, 1000)
    fewest = random.randint(0, 3)
    return random.choice(
        (
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 500)},
            {"type": "string", "minLength": fewest, "maxLength": fewest + random.randint(0, 5)},
            {"type": "string", "pattern": random.choice(_PATTERNS)},
            {"type": "string", "format": random.choice(_FORMATS)},
            {"enum": random.sample([7, -1, True, None, *_NAMES], random.randint(1, 4))},
            {"const": random.choice(_NAMES)},
            {"$ref": "#/$defs/node"},
        )
    )
