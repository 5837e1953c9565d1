"""Samples of one prompt: those after the first wait until its KV is here, and then share it as a prefix hit."""

from __future__ import annotations

from cluster.request import RequestKey
from workers.engine.sequence import Sequence
from workers.serving import Phase, Request


def has_prompt(sequence: Sequence, block_size: int) -> bool:
    """Whether every full block of its prompt can be hit."""
    return sequence.num_ready_blocks >= sequence.num_prompt // block_size


class Followers:
    """Who waits for whom. A leader is any open request; whoever waits holds nothing but its place. Engine thread."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._waiting: dict[RequestKey, list[Request]] = {}  # by leader
        self._released: list[Request] = []

    def add(self, leader: Request, follower: Request) -> bool:
        """False: the leader has its prompt, there is nothing to wait for."""
        if has_prompt(leader.sequence, self._block_size):
            return False
        self._waiting.setdefault(leader.key, []).append(follower)
        follower.wait(float("inf"))
        return True

    def progressed(self, leader: Request, now: float) -> None:
        """Some of its blocks may have been filled."""
        if leader.key in self._waiting and has_prompt(leader.sequence, self._block_size):
            for follower in self._waiting.pop(leader.key):
                self._release(follower, now)

    def gone(self, leader: Request, now: float) -> None:
        """It has ended without its prompt: the first of those that waited leads the others."""
        waiting = [each for each in self._waiting.pop(leader.key, ()) if not each.sequence.is_finished]
        if waiting:
            self._release(waiting[0], now)
            if len(waiting) > 1:
                self._waiting[waiting[0].key] = waiting[1:]

    def take_released(self) -> list[Request]:
        """Those that may begin now, and have not begun or ended meanwhile."""
        released, self._released = self._released, []
        return [each for each in released if each.phase is Phase.PENDING and not each.sequence.is_finished]

    def _release(self, follower: Request, now: float) -> None:
        if not follower.sequence.is_finished:
            follower.pend(now, 0.0)
            self._released.append(follower)
