"""A queue that is shared fairly: deficit round robin over keys, with cost in tokens, priorities within a key.

Shreedhar and Varghese, "Efficient fair queueing using deficit round robin", SIGCOMM 1995. In each round a key that has
something waiting may spend a quantum of tokens, times its weight, and keeps what it does not spend for the next round.
So of two keys that both wait, whatever the sizes of their requests, neither gets more than a quantum and a request
ahead of its share. What a request costs beyond what was known when it left the queue is charged later, as debt.

Among the requests of one key the larger priority goes first, except that one in `_OLDEST_EVERY` is the one that waited
longest: nothing starves. Pure; no clock, one thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Final, Generic, TypeVar

QUANTUM_TOKENS: Final = 2048
_OLDEST_EVERY: Final = 8

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """What waits. `cost` in tokens, at least 1."""

    item: T
    key: str
    cost: int
    priority: int
    order: int
    waiting: bool = True


@dataclass(slots=True, eq=False)
class _Lane(Generic[T]):
    """What waits of one key, twice: by priority, and by arrival. Those that left are skipped when they come up."""

    key: str
    weight: int = 1
    deficit: int = 0
    num_waiting: int = 0
    num_taken: int = 0
    ranked: list[tuple[int, int, Entry[T]]] = field(default_factory=list)
    arrived: deque[Entry[T]] = field(default_factory=deque)

    def push(self, entry: Entry[T]) -> None:
        heappush(self.ranked, (-entry.priority, entry.order, entry))
        self.arrived.append(entry)
        self.num_waiting += 1

    def head(self) -> Entry[T]:
        """The next one; there must be one."""
        while not self.ranked[0][2].waiting:
            heappop(self.ranked)
        while not self.arrived[0].waiting:
            self.arrived.popleft()
        oldest_is_next = self.num_taken % _OLDEST_EVERY == _OLDEST_EVERY - 1
        return self.arrived[0] if oldest_is_next else self.ranked[0][2]


class FairQueue(Generic[T]):
    def __init__(self, quantum_tokens: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum_tokens
        self._lanes: dict[str, _Lane[T]] = {}  # those in the ring, and those in debt
        self._ring: deque[_Lane[T]] = deque()  # the lanes with something waiting; the first one has its turn
        self._num_pushed = 0
        self._num_waiting = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_tokens(self) -> int:
        """The cost of all that waits."""
        return self._num_tokens

    def push(self, item: T, *, key: str = "", cost: int = 1, priority: int = 0, weight: int = 1) -> Entry[T]:
        """`weight`: of the key, from now on. The entry is for `remove`."""
        entry = Entry(item, key, max(1, cost), priority, self._num_pushed)
        self._num_pushed += 1
        lane = self._lanes.setdefault(key, _Lane(key))
        lane.weight = weight
        if not lane.num_waiting:
            self._ring.append(lane)
            if len(self._ring) == 1:
                lane.deficit += self._quantum * weight  # its turn begins
        lane.push(entry)
        self._num_waiting += 1
        self._num_tokens += entry.cost
        return entry

    def pop(self) -> T:
        """The next in turn. Raises IndexError when nothing waits."""
        for num_turns in count(1):
            lane = self._ring[0]
            entry = lane.head()
            if entry.cost <= lane.deficit:
                lane.deficit -= entry.cost
                lane.num_taken += 1
                self._left(entry, lane)
                return entry.item
            self._ring.rotate(-1)
            if num_turns % len(self._ring) == 0:
                self._skip_idle_rounds()
            self._ring[0].deficit += self._quantum * self._ring[0].weight
        raise AssertionError("a round gives everybody something to spend")

    def remove(self, entry: Entry[T]) -> bool:
        """Whether it was still waiting. Costs its key nothing."""
        if not entry.waiting:
            return False
        self._left(entry, self._lanes[entry.key])
        return True

    def charge(self, key: str, num_tokens: int) -> None:
        """What a request of the key cost beyond what it was pushed with. Counts only while anybody waits: who had
        the place for itself owes nobody."""
        if self._num_waiting:
            self._lanes.setdefault(key, _Lane(key)).deficit -= num_tokens

    def _left(self, entry: Entry[T], lane: _Lane[T]) -> None:
        entry.waiting = False
        lane.num_waiting -= 1
        self._num_waiting -= 1
        self._num_tokens -= entry.cost
        if lane.num_waiting:
            return
        had_turn = self._ring[0] is lane
        self._ring.remove(lane)
        lane.ranked.clear()
        lane.arrived.clear()
        lane.deficit = min(0, lane.deficit)  # what is left of a turn is not kept by those who are away; a debt is
        if not self._num_waiting:
            self._lanes.clear()
        elif lane.deficit == 0:
            del self._lanes[lane.key]
        if had_turn and self._ring:
            self._ring[0].deficit += self._quantum * self._ring[0].weight

    def _skip_idle_rounds(self) -> None:
        """Rounds in which everybody only saves are taken at once: a long prompt, or a debt, may need thousands."""
        num_rounds = min(
            -((lane.deficit - lane.head().cost) // (self._quantum * lane.weight)) - 1 for lane in self._ring
        )
        if num_rounds > 0:
            for lane in self._ring:
                lane.deficit += num_rounds * self._quantum * lane.weight
