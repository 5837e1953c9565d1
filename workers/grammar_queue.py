"""Frames whose grammar is new to a worker wait here while it is compiled: the engine goes on stepping meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from cluster.errors import InvalidRequest
from cluster.protos import worker_pb2 as pb
from cluster.request import Grammar, GrammarKind, RequestKey
from workers.engine.constraint import ConstraintCompiler


class _Waiting(NamedTuple):
    session: str
    key: RequestKey
    ask: int
    resume: Callable[[], None]


class GrammarQueue:
    """Engine thread only. Requests of one grammar go on in the order in which they came."""

    def __init__(self, constraints: ConstraintCompiler | None, post: Callable[[Callable[[], None]], None]) -> None:
        """`post` brings a call to the engine thread, from any other."""
        self._constraints = constraints
        self._post = post
        self._waiting: dict[Grammar, list[_Waiting]] = {}
        self._tried: Grammar | None = None  # by those who go on right now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sluice-grammar")

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def holds(
        self, session: str, key: RequestKey, sampling: pb.SamplingParams, resume: Callable[[], None], *, ask: int = 0
    ) -> bool:
        """Whether `resume` is called later, when the verdict on the grammar is known. False: go on now."""
        if self._constraints is None or not sampling.HasField("grammar"):
            return False
        try:
            grammar = Grammar(GrammarKind(sampling.grammar.kind), sampling.grammar.text)
        except ValueError:
            return False  # whoever reads the parameters says so
        waiting = self._waiting.get(grammar)
        if waiting is None:
            if grammar == self._tried or self._constraints.knows(grammar):
                return False
            waiting = self._waiting[grammar] = []
            self._thread.submit(self._compile, self._constraints, grammar)
        waiting.append(_Waiting(session, key, ask, resume))
        return True

    def drop(self, session: str, key: RequestKey, ask: int | None = None) -> None:
        """It is wanted no more. None: whichever ask."""
        self._keep(lambda each: (each.session, each.key) != (session, key) or ask not in (None, each.ask))

    def session_broken(self, session: str) -> None:
        self._keep(lambda each: each.session != session)

    def stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _keep(self, holds: Callable[[_Waiting], bool]) -> None:
        for grammar, waiting in self._waiting.items():
            self._waiting[grammar] = [each for each in waiting if holds(each)]

    def _compile(self, constraints: ConstraintCompiler, grammar: Grammar) -> None:
        """On the thread of its own."""
        try:
            with suppress(InvalidRequest):  # the verdict is kept, and told to each
                constraints.check(grammar)
        finally:
            self._post(lambda: self._go_on(grammar))

    def _go_on(self, grammar: Grammar) -> None:
        """Whether there is a verdict or not: who waited once does not wait again."""
        self._tried = grammar
        for each in self._waiting.pop(grammar):
            each.resume()
        self._tried = None
