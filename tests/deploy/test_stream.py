"""Text piece by piece: no broken character, and stop strings found across pieces."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Message

from cluster.errors import Cancelled
from deploy.stream import Detokenizer, EventStream, StopFinder, event, unless_gone
from tests.support.tokenizer_files import write_tokenizer

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer")).backend_tokenizer


def pieces(backend: tokenizers.Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(backend)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(text=st.text(max_size=40))
@example(text="🦊é東 ")
def test_pieces_of_a_text_add_up_and_break_no_character(backend: tokenizers.Tokenizer, text: str) -> None:
    shown = pieces(backend, backend.encode(text).ids)
    assert "".join(shown) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in shown)


@given(seed=st.integers(0, 2**32))
def test_any_token_ids_can_be_shown(backend: tokenizers.Tokenizer, seed: int) -> None:
    """Random models emit bytes that are no UTF-8: the pieces still add up to what the whole decodes to."""
    ids = random.Random(seed).choices(range(backend.get_vocab_size()), k=60)
    assert "".join(pieces(backend, ids)) == backend.decode(ids)


def test_an_unfinished_character_is_shown_at_the_end(backend: tokenizers.Tokenizer) -> None:
    ids = backend.encode("ok🦊").ids[:-1]
    shown = pieces(backend, ids)
    assert "".join(shown[:-1]) == "ok" and set(shown[-1]) == {REPLACEMENT}


def test_special_tokens_are_no_text(backend: tokenizers.Tokenizer) -> None:
    ids = backend.encode("fox<|end|>dog").ids
    assert "".join(pieces(backend, ids)) == "foxdog"


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    text = draw(st.text("abc", max_size=30))
    stops = draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)], stops


@given(cut_texts())
@example((["xa", "b"], ["ab"]))
def test_the_text_ends_where_a_stop_string_begins(case: tuple[list[str], list[str]]) -> None:
    """However it is cut into pieces: the first stop string to be complete ends the text before it."""
    parts, stops = case
    finder, shown, found = StopFinder(stops), "", None
    for part in parts:
        text, found = finder.push(part)
        shown += text
        if found is not None:
            break
    else:
        shown += finder.flush()
    whole = "".join(parts)
    if found is None:
        assert shown == whole and not any(stop in whole for stop in stops)
    else:
        assert found in stops and whole.startswith(shown + found)
        assert not any(stop in shown for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopFinder(["stop"])
    assert finder.push("and sto") == ("and ", None)
    assert finder.push("ne s") == ("stone ", None)
    assert finder.push("top it") == ("", "stop")


def test_an_event_is_one_line() -> None:
    assert event({"text": "a\nb é"}) == 'data: {"text":"a\\nb é"}\n\n'.encode()
    assert json.loads(event('{"a":1}').removeprefix(b"data: ")) == {"a": 1}


def test_work_ends_when_the_client_is_gone() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def scene() -> None:
        with pytest.raises(Cancelled):
            await unless_gone(work(), gone)
        assert ended.is_set()

    asyncio.run(scene())


def test_a_reader_that_stops_and_leaves_ends_the_events() -> None:
    """The client reads nothing, so that sending blocks; its leaving is noticed all the same."""
    closed = asyncio.Event()

    async def events():
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.set()

    async def scene() -> None:
        blocked = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.Event().wait()

        async def receive() -> Message:
            await blocked.wait()
            return {"type": "http.disconnect"}

        await EventStream(events())({"type": "http"}, receive, send)
        assert closed.is_set()

    asyncio.run(scene())
