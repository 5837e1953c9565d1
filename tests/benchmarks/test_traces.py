"""Traces: lines that are requests, lines that are none, prompts that share what their hash ids share."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.trace import TraceError, TraceRequest, faster, read, write
from benchmarks.simulator.traffic import Conversations, day

GOOD = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, *range(100, 112)]}


def test_a_published_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "session": "a"}) + "\n")
    first, second = read(path)
    assert (first.at_ms, first.num_input, first.num_output, first.session) == (27482, 6955, 52, "")
    assert first.hash_ids[:2] == (46, 47) and len(first.hash_ids) == 14 and second.session == "a"
    (half, _) = faster([first, second], 2)
    assert half.at_ms == 13741 and half.hash_ids == first.hash_ids


BAD = [
    ("{", "no JSON", "one object a line"),
    ("[1]", "is no object", "input_length"),
    ('{"timestamp": 1, "hash_ids": []}', "input_length and output_length missing", "every line has"),
    (json.dumps({**GOOD, "timestamp": -1}), "timestamp -1", "milliseconds"),
    (json.dumps({**GOOD, "timestamp": "soon"}), "timestamp 'soon'", "milliseconds"),
    (json.dumps({**GOOD, "input_length": 0}), "input_length 0", "1 or more"),
    (json.dumps({**GOOD, "output_length": 2.5}), "output_length 2.5", "whole number"),
    (json.dumps({**GOOD, "hash_ids": [1, -1]}), "hash_ids are no list", "number the blocks"),
    (json.dumps({**GOOD, "hash_ids": [1, 2]}), "2 hash_ids for 6955 tokens", "--trace-block"),
    (json.dumps({**GOOD, "session": 7}), "session 7", "leave it out"),
    (json.dumps({**GOOD, "timestamp": 5}), "timestamp 5 is before the one above", "sort"),
]


@pytest.mark.parametrize(("line", "what", "remedy"), BAD)
def test_a_line_that_is_no_request_is_named_with_what_to_do(tmp_path: Path, line: str, what: str, remedy: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps({**GOOD, 'timestamp': 10})}\n{line}\n")
    with pytest.raises(TraceError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert what in str(raised.value) and remedy in str(raised.value)


def test_an_empty_file_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n")
    with pytest.raises(TraceError, match="no requests"):
        read(path)


ids = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=4, unique=True)


@given(first=ids, second=ids, length=st.integers(1, 64), vocab_size=st.sampled_from((300, 5000, 1 << 31)))
def test_prompts_share_what_their_hash_ids_share(
    first: list[int], second: list[int], length: int, vocab_size: int
) -> None:
    """Blocks of 16 tokens; ids of four digits in the smallest vocabulary."""
    prompts = [
        TraceRequest(0, length, 1, tuple(each)[: -(-length // 16)]).prompt(vocab_size, 16) for each in (first, second)
    ]
    assert [len(prompt) for prompt in prompts] == [length, length]
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)
    for place in range(min(len(first), len(second), length // 16)):
        shared = prompts[0][16 * place : 16 * place + 16] == prompts[1][16 * place : 16 * place + 16]
        assert shared == (first[place] % vocab_size**4 == second[place] % vocab_size**4)


TALK = Conversations(sessions_per_s=2, span_s=100, seed=1, num_beginnings=3)


def test_a_seed_gives_one_trace_that_can_be_read_back(tmp_path: Path) -> None:
    trace = TALK.requests()
    assert trace == TALK.requests() and len(trace) > 300
    assert trace != Conversations(sessions_per_s=2, span_s=100, seed=2, num_beginnings=3).requests()
    write(tmp_path / "trace.jsonl", trace)
    assert read(tmp_path / "trace.jsonl") == trace


def test_turns_of_a_session_go_on_from_what_was_said() -> None:
    trace = TALK.requests()
    by_session: dict[str, list[TraceRequest]] = {}
    for request in trace:
        by_session.setdefault(request.session, []).append(request)
    for turns in by_session.values():
        for before, after in pairwise(turns):
            num_full = before.num_input // TALK.trace_block
            assert after.hash_ids[:num_full] == before.hash_ids[:num_full]
            assert after.num_input > before.num_input + before.num_output and after.at_ms > before.at_ms
    beginnings = {turns[0].hash_ids[0] for turns in by_session.values() if turns[0].num_input >= TALK.trace_block}
    assert len(beginnings) < len(by_session) / 4  # most sessions begin as others do


def test_a_day_has_a_quiet_night() -> None:
    assert day(2 * 3600) == pytest.approx(0.1) and day(14 * 3600) == pytest.approx(1.0)
    night = Conversations(sessions_per_s=1, span_s=1000, seed=1, swing=lambda at_s: day(2 * 3600)).requests()
    noon = Conversations(sessions_per_s=1, span_s=1000, seed=1, swing=lambda at_s: day(14 * 3600)).requests()
    assert len(night) < len(noon) / 5
