"""Requests to replay: arrival, lengths, and which blocks their prompts share. One JSON object a line, see
docs/simulator.md; the published traces of Mooncake have this form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TRACE_BLOCK: Final = 512  # tokens that a hash id stands for
_DIGITS: Final = 4  # tokens that tell one hash id from another
_FIELDS: Final = ("timestamp", "input_length", "output_length", "hash_ids")


class TraceError(ValueError):
    """A line that is no request: where it stands, what is wrong, what to do."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """Equal hash ids stand for equal blocks after equal beginnings, as in a hash chain."""

    at_ms: float  # after the start of the trace
    num_input: int  # tokens
    num_output: int
    hash_ids: tuple[int, ...]  # of each block of the prompt; the last one, if it is not full, may be left out
    session: str = ""  # conversation that it belongs to; "": not told

    def prompt(self, vocab_size: int, trace_block: int = TRACE_BLOCK) -> list[int]:
        """[num_input] token ids below `vocab_size`; blocks are equal where their hash ids are."""
        tokens: list[int] = []
        for hash_id in self.hash_ids:
            digits = [hash_id // vocab_size**place % vocab_size for place in range(_DIGITS)]
            tokens += (digits * -(-trace_block // _DIGITS))[:trace_block]
        rest = [(self.num_input + place) % vocab_size for place in range(max(0, self.num_input - len(tokens)))]
        return (tokens + rest)[: self.num_input]

    def line(self) -> str:
        fields = dict(zip(_FIELDS, (self.at_ms, self.num_input, self.num_output, list(self.hash_ids)), strict=True))
        return json.dumps({**fields, "session": self.session} if self.session else fields)


def write(path: Path, requests: Iterable[TraceRequest]) -> None:
    path.write_text("".join(f"{request.line()}\n" for request in requests))


def read(path: Path, trace_block: int = TRACE_BLOCK) -> list[TraceRequest]:
    """Raises TraceError, and OSError where there is no such file."""
    requests: list[TraceRequest] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                request = _parse(line, trace_block)
                if requests and request.at_ms < requests[-1].at_ms:
                    raise TraceError(f"timestamp {request.at_ms:g} is before the one above; sort the lines by it")
            except TraceError as error:
                raise TraceError(f"{path}:{number}: {error}") from None
            requests.append(request)
    if not requests:
        raise TraceError(f"{path}: no requests; one JSON object a line is wanted, with {', '.join(_FIELDS)}")
    return requests


def _parse(line: str, trace_block: int) -> TraceRequest:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise TraceError(f"no JSON ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise TraceError(f"{line.strip()[:60]!r} is no object; write one with {', '.join(_FIELDS)}")
    if missing := [name for name in _FIELDS if name not in fields]:
        raise TraceError(f"{' and '.join(missing)} missing; every line has {', '.join(_FIELDS)}")
    at_ms, hash_ids, session = fields["timestamp"], fields["hash_ids"], fields.get("session", "")
    if not isinstance(at_ms, int | float) or isinstance(at_ms, bool) or not 0 <= at_ms < float("inf"):
        raise TraceError(f"timestamp {at_ms!r}; give milliseconds after the start, 0 or more")
    num_input, num_output = (_count(fields, name) for name in ("input_length", "output_length"))
    if not isinstance(hash_ids, list) or not all(type(each) is int and 0 <= each < 1 << 32 for each in hash_ids):
        raise TraceError("hash_ids are no list of whole numbers from 0 to 2^32 - 1; number the blocks")
    if not num_input // trace_block <= len(hash_ids) <= -(-num_input // trace_block):
        raise TraceError(
            f"{len(hash_ids)} hash_ids for {num_input} tokens; that is not one for each {trace_block} tokens: give the "
            "block size of the trace with --trace-block"
        )
    if not isinstance(session, str):
        raise TraceError(f"session {session!r}; give a name or leave it out")
    return TraceRequest(at_ms, num_input, num_output, tuple(hash_ids), session)


def _count(fields: dict[str, object], name: str) -> int:
    value = fields[name]
    if type(value) is not int or value < 1:
        raise TraceError(f"{name} {value!r}; give a whole number of tokens, 1 or more")
    return value


def faster(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The same requests in a `factor`-th of the time."""
    return [
        TraceRequest(each.at_ms / factor, each.num_input, each.num_output, each.hash_ids, each.session)
        for each in requests
    ]
