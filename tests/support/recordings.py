"""What clients returned, kept in tests/fixtures without what differs from run to run or with the model's vocabulary.

Ids, times, texts and measured numbers are replaced, and of a list of alike entries one is kept: fields, nulls, order
of different entries, finish reasons and numbers of tokens asked for are compared.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
_VARYING = {
    *("bytes", "cached_tokens", "content", "created", "embedding", "id", "logprob", "prompt_tokens", "response_ms"),
    *("system_fingerprint", "text", "text_offset", "token", "token_logprobs", "tokens", "total_tokens"),
}
_BY_TOKEN = "top_logprobs"  # of completions: its objects have tokens as keys


def shape(tree: Any, key: str = "") -> Any:
    if isinstance(tree, dict):
        if key == _BY_TOKEN and not tree.keys() >= {"token", "logprob"}:
            return {"TOKEN": 0.0}
        return {name: shape(value, name) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        shapes = [shape(value, key) for value in tree]
        return [each for number, each in enumerate(shapes) if number == 0 or each != shapes[number - 1]]
    if tree is None or isinstance(tree, bool) or key not in _VARYING:
        return tree
    return re.sub(r"-.*", "-ID", tree) if key == "id" else type(tree).__name__


def assert_as_recorded(name: str, tree: object) -> None:
    """Writes the recording instead where SLUICE_RECORD is set."""
    path = FIXTURES / f"{name}.json"
    text = json.dumps(shape(tree), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if os.environ.get("SLUICE_RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
