"""What clients returned, kept in tests/fixtures without what differs from run to run or with the model's vocabulary.

Ids, times, texts and measured numbers are replaced, and of a list of alike entries one is kept: fields, nulls, order
of different entries, finish reasons and numbers of tokens asked for are compared.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.support.recording_proxy import Exchange

IS_RECORDING = bool(os.environ.get("SLUICE_RECORD"))
FIXTURES = Path(__file__).parents[1] / "fixtures"
_VARYING = {
    *("arguments", "bytes", "cached_tokens", "content", "created", "embedding", "id", "logprob", "prompt_tokens"),
    *("response_ms", "system_fingerprint", "text", "text_offset", "token", "token_logprobs", "tokens", "total_tokens"),
}
_BY_TOKEN = "top_logprobs"  # of completions: its objects have tokens as keys


def shape(tree: Any, key: str = "") -> Any:
    if isinstance(tree, dict):
        if key == _BY_TOKEN and not tree.keys() >= {"token", "logprob"}:
            return {"TOKEN": 0.0}
        told = {name: shape(value, name) for name, value in tree.items()}
        ends = {choice["finish_reason"] for choice in tree.get("choices") or ()}
        if ends - {"length"} and told.get("usage"):
            told["usage"]["completion_tokens"] = "int"  # up to what the model said to end
        return told
    if isinstance(tree, list | tuple):
        shapes = [shape(value, key) for value in tree]
        return [each for number, each in enumerate(shapes) if number == 0 or each != shapes[number - 1]]
    if tree is None or isinstance(tree, bool) or key not in _VARYING:
        return tree
    return re.sub(r"[-_].*", "-ID", tree) if key == "id" else type(tree).__name__


def shape_of_answer(tree: Any) -> Any:
    """Of a stream (a list of events) what its events have in all: how many tokens come together is not ours to say."""
    if not isinstance(tree, list):
        return shape(tree)
    *events, done = tree
    told = [shape(event) for event in events if event["choices"]]
    for event in told:
        if event.get("usage"):
            event["usage"]["completion_tokens"] = "int"  # so far
    return {"events": _union(told), "last": [shape(event) for event in events if not event["choices"]], "done": done}


def _union(trees: Sequence[Any]) -> Any:
    """One tree with the fields of all, and with the different values of each."""
    some = [tree for tree in trees if tree is not None]
    if some and all(isinstance(tree, dict) for tree in some):
        names = sorted({name for tree in some for name in tree})
        return {name: _union([tree[name] for tree in some if name in tree]) for name in names}
    if some and all(isinstance(tree, list) for tree in some):
        return [_union([each for tree in some for each in tree])]
    return sorted({json.dumps(tree) for tree in some})


def assert_as_recorded(name: str, tree: object) -> None:
    """Writes the recording instead where SLUICE_RECORD is set."""
    path = FIXTURES / f"{name}.json"
    text = _written(shape(tree))
    if IS_RECORDING:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def record_requests(client: str, exchanges: Sequence[Exchange]) -> None:
    kept = [asdict(replace(each, answer=shape_of_answer(each.answer))) for each in exchanges]
    path = FIXTURES / f"{client}-requests.json"
    path.write_text(_written(sorted(kept, key=lambda each: (each["method"], each["path"], json.dumps(each["body"])))))


def recorded_requests(client: str) -> list[Exchange]:
    """What a client sent; answers as `shape_of_answer` leaves them."""
    return [Exchange(**each) for each in json.loads((FIXTURES / f"{client}-requests.json").read_text())]


def _written(tree: Any) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
