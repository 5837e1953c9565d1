"""Kinds of fields that several request bodies share, and the body that refuses what it does not know."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_PROMPTS: Final = 2048
MAX_LOGPROBS: Final = 20
MAX_BIASES: Final = 1024
MAX_BAD_WORDS: Final = 1024
MAX_BIAS: Final = 100
UNSUPPORTED: Final = "unsupported_parameter"
MAX_TOKEN_ID: Final = 2**31

TokenIds = list[int]


class Body(BaseModel):
    """Frozen and strict. null means the default, as OpenAI documents for most of its parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}


def refused(remedy: str) -> BeforeValidator:
    """For a parameter of OpenAI's that would change the answer and cannot: named, with what to do instead."""

    def refuse(value: object) -> object:
        raise PydanticCustomError(UNSUPPORTED, "{remedy}", {"remedy": remedy})

    return BeforeValidator(refuse)


def only(value: object, remedy: str) -> BeforeValidator:
    """For a parameter that is accepted where it asks for what is done anyway."""

    def check(given: object) -> object:
        if given != value or type(given) is not type(value):
            raise PydanticCustomError(UNSUPPORTED, "{remedy}", {"remedy": remedy})
        return given

    return BeforeValidator(check)


_TOKENS: Final = TypeAdapter(
    Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=MAX_TOKEN_ID)]], Field(strict=True, fail_fast=True)]
)


def is_token_ids(value: object) -> bool:
    """A list, empty or of token ids. Not a loop of ours: prompts are long, and the router waits."""
    try:
        _TOKENS.validate_python(value)
    except ValidationError:
        return False
    return True


def _prompts(value: object) -> object:
    """A text, token ids, or a list of either."""
    if isinstance(value, str) or (isinstance(value, list) and value and is_token_ids(value)):
        return value
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts are over the limit of {MAX_PROMPTS}; send several requests")
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return value
        if all(isinstance(each, list) and each and is_token_ids(each) for each in value):
            return value
    raise ValueError("a text, a list of token ids that is not empty, or a list of either; send one of these")


_TOKEN_IDS_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_TOKEN_ID},
    "minItems": 1,
}
Prompts = Annotated[
    str | TokenIds | list[str] | list[TokenIds],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _TOKEN_IDS_SCHEMA,
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


def each_prompt(prompts: str | TokenIds | list[str] | list[TokenIds]) -> list[str | TokenIds]:
    """One by one."""
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        return stops
    if any(stop == "" for stop in stops):
        raise ValueError("an empty stop string would end everything at once; remove it")
    longest = max((len(stop) for stop in stops if isinstance(stop, str)), default=0)
    if longest > MAX_STOP_CHARS:
        raise ValueError(f"a stop string of {longest} characters is over the limit of {MAX_STOP_CHARS}; shorten it")
    return stops


_STOP_SCHEMA: Final[dict[str, Any]] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    Field(max_length=MAX_STOPS),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS}]}),
]


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """OpenAI writes token ids as strings, because they are keys."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"an object of at most {MAX_BIASES} token ids, each with a number from -100 to 100")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"{str(key)[:40]!r} is no token id; write its digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of token {key} is no number from -100 to 100; change it")
        biases[int(key)] = float(bias)
    return tuple(sorted(biases.items()))


Biases = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
            "maxProperties": MAX_BIASES,
        }
    ),
]


def _bad_words(value: object) -> list[str | TokenIds]:
    if not isinstance(value, list) or len(value) > MAX_BAD_WORDS:
        raise ValueError(f"a list of at most {MAX_BAD_WORDS} words, each a text or a list of token ids")
    for word in value:
        if not word or not (isinstance(word, str) or is_token_ids(word)):
            raise ValueError("each word is a text or a list of token ids, and not empty; change the others")
    return value


BadWords = Annotated[
    list[str | TokenIds],
    PlainValidator(_bad_words),
    WithJsonSchema(
        {
            "type": "array",
            "maxItems": MAX_BAD_WORDS,
            "items": {"anyOf": [{"type": "string", "minLength": 1}, _TOKEN_IDS_SCHEMA]},
        }
    ),
]


def _decoder_prompt(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and value and is_token_ids(value)):
        return value
    raise ValueError("a text, or a list of token ids that is not empty; send one of these")


DecoderPrompt = Annotated[
    str | TokenIds,
    PlainValidator(_decoder_prompt),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TOKEN_IDS_SCHEMA]}),
]
Language = Annotated[str, Field(min_length=1, max_length=40)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
Int31 = Annotated[int, Field(ge=0, lt=MAX_TOKEN_ID)]
Count = Annotated[int, Field(ge=1, lt=MAX_TOKEN_ID)]
JsonObject = dict[str, Any]
