"""What a fuzzer sends: valid bodies with every field at its edges, mutants of these, and JSON of any shape."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.support.public_door import MODEL
from tests.support.random_schemas import random_schemas

Json = dict[str, Any]

PATHS: Final = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")
MAX_TOKENS: Final = 6  # of most cases: the fields are of interest, not long texts
UNLIMITED_TIMEOUT_S: Final = 0.5

_NASTY_TEXTS: Final = (
    "\x00",
    "\x7f\x1b[2J",
    "\ufeff",
    "\u202eabc",
    "é\u0301",
    "👩‍👩‍👧‍👦",
    "🦊" * 9,
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "ﷺ" * 5,
    "\r\n\r\n",
    "data: [DONE]\n\n",
    "<|end|>",
    "<|user|>",
    "{{ 7 * 7 }}",
    "{% raise %}",
    " ",
    "\t\n",
    "a" * 600,
    "\\u0000",
    '"',
    "𝓐𝓑",
    "中文字",
)


def texts(min_size: int = 0, max_size: int = 40) -> SearchStrategy[str]:
    """Any characters but halves of surrogate pairs."""
    chars = st.characters(exclude_categories=["Cs"])
    nasty = st.sampled_from([text for text in _NASTY_TEXTS if len(text) >= min_size])
    return st.one_of(st.text(chars, min_size=min_size, max_size=max_size), nasty, st.text("abc de", min_size=min_size))


def token_ids(vocab_size: int, max_size: int = 48) -> SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=max_size)


def _fields(vocab_size: int) -> dict[str, SearchStrategy[Any]]:
    """Of completions and chat, valid ones only."""
    token = st.integers(0, vocab_size - 1)
    many = st.integers(0, vocab_size - 1024).map(lambda first: range(first, first + 1024))
    edge = st.sampled_from([-100, 100, -0.5, 1e-9, 0])
    few_biases = st.dictionaries(token.map(str), edge, max_size=20)
    word = st.one_of(texts(1, 5), st.lists(token, min_size=1, max_size=3))
    return {
        "n": st.sampled_from([1, 1, 1, 2, 3, 7]),
        "temperature": st.sampled_from([0, 0.0, 1e-9, 0.5, 1, 2, 5e-324]),
        "top_p": st.sampled_from([1, 1.0, 1e-9, 0.3, 5e-324]),
        "top_k": st.sampled_from([0, 1, 2, 40, vocab_size, 2**31 - 1]),
        "min_p": st.sampled_from([0, 1, 0.1, 1e-300]),
        "presence_penalty": st.sampled_from([-2, 2, 0.1]),
        "frequency_penalty": st.sampled_from([-2, 2, 0.1]),
        "repetition_penalty": st.sampled_from([1, 100, 0.01, 1.3]),
        "logit_bias": st.one_of(
            few_biases,
            many.map(lambda ids: {str(each): 100 for each in ids}),
            many.map(lambda ids: {str(each): -100 for each in ids}),
        ),
        "bad_words": st.one_of(st.lists(word, max_size=8), many.map(lambda ids: [[each] for each in ids])),
        "seed": st.sampled_from([0, 1, 2**63, 2**64 - 1, -(2**63)]),
        "stop": st.one_of(
            texts(1), st.lists(texts(1), max_size=16), st.lists(st.sampled_from(list("eatons \n._")), max_size=4)
        ),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.lists(token, max_size=64),
        "ignore_eos": st.booleans(),
        "prompt_logprobs": st.integers(0, 20),
        "priority": st.sampled_from([0, -(2**31), 2**31 - 1]),
        "user": texts(),
    }


@st.composite
def _asked(draw: st.DrawFn, fields: dict[str, SearchStrategy[Any]], body: Json) -> Json:
    """`body` with a few of the fields."""
    for name in draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=7)):
        body[name] = draw(fields[name])
    if draw(st.booleans()):
        body["min_tokens"] = draw(st.sampled_from([0, 1, body["max_tokens"]]))
    return {"return_token_ids": True, **body}


@st.composite
def completions(draw: st.DrawFn, vocab_size: int) -> Json:
    """Valid: each must be answered with 200."""
    one = st.one_of(texts(1), token_ids(vocab_size))
    prompt = draw(
        st.one_of(
            one,
            one,
            one,
            st.lists(texts(1), min_size=1, max_size=3),
            st.lists(token_ids(vocab_size), min_size=1, max_size=3),
        )
    )
    fields = _fields(vocab_size) | {
        "echo": st.booleans(),
        "logprobs": st.integers(0, 20),
        "suffix": st.none(),
        "add_special_tokens": st.booleans(),
    }
    body: Json = {"model": MODEL, "prompt": prompt, "max_tokens": draw(st.integers(1, MAX_TOKENS))}
    body = draw(_asked(fields, body))
    if draw(st.integers(0, 9)) == 0:
        body["best_of"] = draw(st.integers(body.get("n", 1), 8))
    elif draw(st.integers(0, 19)) == 0:
        body |= {"max_tokens": 0, "min_tokens": 0, "echo": True}
    return body


@st.composite
def chats(draw: st.DrawFn, vocab_size: int) -> Json:
    """Valid ones."""
    content = st.one_of(
        texts(), st.lists(texts().map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
    )
    roles = st.sampled_from(["system", "user", "assistant", "developer"])
    messages = st.lists(st.fixed_dictionaries({"role": roles, "content": content}), min_size=1, max_size=4)
    limit = draw(st.sampled_from(["max_tokens", "max_completion_tokens"]))
    max_tokens = draw(st.integers(1, MAX_TOKENS))
    body: Json = {"model": MODEL, "messages": draw(messages), "max_tokens": max_tokens}
    body = draw(_asked(_fields(vocab_size) | {"metadata": st.dictionaries(texts(), texts(), max_size=3)}, body))
    body[limit] = body.pop("max_tokens")
    if draw(st.booleans()):
        body["logprobs"] = True
        if draw(st.booleans()):
            body["top_logprobs"] = draw(st.integers(0, 20))
    return body


@st.composite
def formed(draw: st.DrawFn, vocab_size: int) -> Json:
    """Chats whose answers have a random schema, some cut short."""
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "prompt_logprobs", "presence_penalty")
    fields = {name: strategy for name, strategy in _fields(vocab_size).items() if name in names}
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    (schema,) = random_schemas(1, seed=draw(st.integers(0, 2**32)))
    return {
        **{name: draw(fields[name]) for name in chosen},
        "model": MODEL,
        "messages": [{"role": "user", "content": draw(texts())}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        "max_tokens": draw(st.sampled_from([1, 3, 40, 160])),
        "n": draw(st.sampled_from([1, 1, 2])),
        "return_token_ids": True,
        "logprobs": draw(st.booleans()),
        "stream": draw(st.booleans()),
    }


@st.composite
def embeddings(draw: st.DrawFn, vocab_size: int) -> Json:
    one = st.one_of(texts(1), token_ids(vocab_size))
    several = st.one_of(
        st.lists(texts(1), min_size=1, max_size=3), st.lists(token_ids(vocab_size), min_size=1, max_size=3)
    )
    body: Json = {"model": MODEL, "input": draw(st.one_of(one, several))}
    if draw(st.booleans()):
        body["pooling"] = draw(st.sampled_from(["last", "mean"]))
    return body


def tokenizing() -> SearchStrategy[Json]:
    return texts().map(lambda text: {"model": MODEL, "prompt": text, "add_special_tokens": False})


def detokenizing(vocab_size: int) -> SearchStrategy[Json]:
    return st.lists(st.integers(0, vocab_size - 1), max_size=30).map(lambda ids: {"model": MODEL, "tokens": ids})


def valid(vocab_size: int) -> SearchStrategy[tuple[str, Json]]:
    """A path with a body for it."""
    kinds = (completions(vocab_size), chats(vocab_size), embeddings(vocab_size), tokenizing(), detokenizing(vocab_size))
    return st.one_of(*(st.tuples(st.just(path), kind) for path, kind in zip(PATHS, kinds, strict=True)))


# ---------------------------------------------------------------- not valid, or who knows

EXTREMES: Final = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**64),
    10**400,
    0.1,
    -0.0,
    1e308,
    5e-324,
    "",
    "0",
    "null",
    "\x00",
    [],
    [[]],
    [[], []],
    {},
    {"": {}},
    [None],
    [0],
    [-1],
    [True],
    [1.5],
    ["", ""],
    [2**31],
    [2**64],
    [[2**70]],
    {"0": "1"},
    {"-1": 1},
    {"00": 1},
    {"٣": 1},
    {"0": 1e308},
    {"9" * 5000: 1},
    {"type": "json_schema"},
    {"type": "text"},
    "auto",
    "required",
    "x" * 5000,
)


def any_json() -> SearchStrategy[Any]:
    numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
    leaves = st.one_of(st.none(), st.booleans(), numbers, texts(), st.sampled_from(EXTREMES))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts(), inner, max_size=4)),
        max_leaves=12,
    )


_NAMES: Final = tuple(
    (
        "audio function_call functions modalities parallel_tool_calls prediction reasoning_effort "
        "response_format service_tier store stream stream_options timeout_s tool_choice tools top_logprobs "
        "verbosity web_search_options dimensions encoding_format pooling chat_template_kwargs "
        "continue_final_message add_generation_prompt return_route n best_of max_tokens min_tokens logprobs "
        "echo suffix stop logit_bias bad_words seed model prompt messages input tokens temperature top_p "
        "top_k unknown __class__ model_config "
    ).split()
)


@st.composite
def mutants(draw: st.DrawFn, vocab_size: int) -> tuple[str, bytes]:
    """A valid body with one thing changed: dropped, doubled, of another type, extreme, nested, or put elsewhere."""
    path, body = draw(valid(vocab_size))
    name = draw(st.one_of(st.sampled_from(sorted(body)), st.sampled_from(_NAMES)))
    change = draw(
        st.sampled_from(["drop", "double", "extreme", "extreme", "extreme", "any", "nest", "wrap", "elsewhere"])
    )
    if change == "drop":
        body.pop(name, None)
    elif change == "extreme":
        body[name] = draw(st.sampled_from(EXTREMES))
    elif change == "any":
        body[name] = draw(any_json())
    elif change == "wrap":
        body[name] = draw(st.sampled_from([[body.get(name)], {"x": body.get(name)}, str(body.get(name))]))
    elif change == "elsewhere":
        path = draw(st.sampled_from(PATHS))
    written = written_json(body)
    if change == "double" and name in body:
        again = json.dumps({name: draw(st.sampled_from([body[name], None, 1, "x"]))})
        written = written[:-1] + b", " + again.encode()[1:]
    if change == "nest":
        depth = draw(st.sampled_from([50, 99, 101, 1000, 100_000]))
        return path, written[:-1] + b', "stop": ' + b"[" * depth + b"]" * depth + b"}"
    return path, _ending_soon(path, written)


def _ending_soon(path: str, written: bytes) -> bytes:
    """A chat without a limit goes on to the model's: it is given a short time instead."""
    body = json.loads(written)
    limited = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens", "timeout_s"))
    if path != "/v1/chat/completions" or limited:
        return written
    return written[:-1] + b', "timeout_s": %g}' % UNLIMITED_TIMEOUT_S


def written_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def written_oddly(draw: st.DrawFn, vocab_size: int) -> tuple[str, bytes]:
    """A valid body in writing that JSON, or UTF-8, forbids or just allows."""
    path, body = draw(valid(vocab_size))
    written = written_json(body)
    at = draw(st.integers(0, len(written)))
    odd = draw(
        st.sampled_from(
            [
                b"\x00",
                b"\xff",
                b"\xc0\x80",
                b"\xed\xa0\x80",
                b"NaN",
                b"1e999",
                b"-",
                b",",
                b"}",
                b"{",
                b'"',
                b"\\ud800",
                b"\\",
                b" \n\t",
                b"/**/",
                b"\xef\xbb\xbf",
            ]
        )
    )
    how = draw(st.sampled_from(["insert", "cut", "replace", "utf-16", "ascii"]))
    if how == "insert":
        return path, written[:at] + odd + written[at:]
    if how == "cut":
        return path, written[:at]
    if how == "replace":
        return path, written[:at] + odd + written[at + len(odd) :]
    return path, json.dumps(body).encode("utf-16" if how == "utf-16" else "ascii")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
