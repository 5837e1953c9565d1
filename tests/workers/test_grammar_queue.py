"""What waits for a grammar goes on in order once there is a verdict, unless it is wanted no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from cluster.errors import InvalidRequest
from cluster.protos import worker_pb2 as pb
from cluster.request import Grammar, GrammarKind, RequestKey, SamplingParams
from tests.support.tokenizer_files import write_tokenizer
from workers.engine.grammar import GrammarCompiler
from workers.grammar_queue import GrammarQueue

VOCAB_SIZE = 400
RED, BLUE, WRONG = (Grammar(GrammarKind.REGEX, text) for text in ("red", "blue", "(red"))


class Desk:
    """A queue, the inbox that it posts to, and who went on."""

    def __init__(self, folder: Path) -> None:
        self.compiler = GrammarCompiler(folder / "tokenizer.json", VOCAB_SIZE, frozenset({0}))
        self.inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.queue = GrammarQueue(self.compiler, self.inbox.put)
        self.went_on: list[str] = []

    def holds(self, who: str, grammar: Grammar | None, *, session: str = "s", ask: int = 0) -> bool:
        sampling = SamplingParams(grammar=grammar).wire()
        return self.queue.holds(session, RequestKey(who, 1), sampling, lambda: self.went_on.append(who), ask=ask)

    def verdicts(self, count: int) -> None:
        """Waits for that many, and lets go on who waited for them."""
        for _ in range(count):
            self.inbox.get(timeout=30)()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    write_tokenizer(tmp_path)
    desk = Desk(tmp_path)
    yield desk
    desk.queue.stop()


def test_requests_of_one_grammar_go_on_in_order(desk: Desk) -> None:
    assert desk.holds("leader", RED) and desk.holds("other", BLUE)
    assert desk.holds("follower", RED), "known or not: its leader has not gone on yet"
    assert desk.queue.num_waiting == 3 and desk.went_on == []
    desk.verdicts(2)
    assert desk.went_on == ["leader", "follower", "other"] and desk.queue.num_waiting == 0
    assert desk.compiler.knows(RED) and not desk.holds("later", RED)


def test_what_is_refused_goes_on_to_hear_it(desk: Desk) -> None:
    assert desk.holds("wrong", WRONG)
    desk.verdicts(1)
    assert desk.went_on == ["wrong"] and desk.compiler.knows(WRONG) and not desk.holds("again", WRONG)
    with pytest.raises(InvalidRequest, match="unclosed group"):
        desk.compiler.check(WRONG)


def test_who_is_wanted_no_more_does_not_go_on(desk: Desk) -> None:
    for who, session, ask in (("a", "s", 0), ("b", "s", 1), ("b", "s", 2), ("c", "t", 0), ("d", "s", 0)):
        assert desk.holds(who, RED, session=session, ask=ask)
    desk.queue.drop("s", RequestKey("a", 1))
    desk.queue.drop("t", RequestKey("d", 1))  # somebody else's
    desk.queue.drop("s", RequestKey("b", 1), ask=1)
    desk.queue.session_broken("t")
    assert desk.queue.num_waiting == 2
    desk.verdicts(1)
    assert desk.went_on == ["b", "d"]


def test_what_needs_no_verdict_does_not_wait(desk: Desk) -> None:
    assert not desk.holds("free", None)
    wire = pb.SamplingParams(grammar=pb.Grammar(text="a"))
    assert not desk.queue.holds("s", RequestKey("unknown kind", 1), wire, lambda: None)
    without = GrammarQueue(None, desk.inbox.put)
    assert not without.holds("s", RequestKey("x", 1), SamplingParams(grammar=RED).wire(), lambda: None)
    without.stop()


def test_who_waited_once_does_not_wait_again(desk: Desk) -> None:
    """The verdict may be forgotten by then, or there never was one."""
    sampling = SamplingParams(grammar=RED).wire()
    asked_again: list[bool] = []

    def resume() -> None:
        asked_again.append(desk.queue.holds("s", RequestKey("a", 1), sampling, resume))

    assert desk.queue.holds("s", RequestKey("a", 1), sampling, resume)
    go_on = desk.inbox.get(timeout=30)
    desk.compiler._verdicts.clear()
    go_on()
    assert asked_again == [False] and desk.queue.num_waiting == 0
    assert desk.holds("later", RED)
    desk.verdicts(1)
