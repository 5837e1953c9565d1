"""The fair queue: against a plain deficit round robin, and what it promises of shares, order and loss."""

from __future__ import annotations

from collections import deque
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fair_queue import FairQueue

costs = st.integers(1, 5000)


def drain(queue: FairQueue[int]) -> list[int]:
    return [queue.pop() for _ in range(len(queue))]


def plain(lanes: dict[str, list[tuple[int, int]]], weights: dict[str, int], quantum: int) -> list[int]:
    """The items in the paper's order: every round visits every lane. `lanes`: (item, cost) in order."""
    waiting = {key: deque(lane) for key, lane in lanes.items() if lane}
    deficits = dict.fromkeys(waiting, 0)
    taken: list[int] = []
    while waiting:
        for key in list(waiting):
            deficits[key] += quantum * weights[key]
            lane = waiting[key]
            while lane and lane[0][1] <= deficits[key]:
                item, cost = lane.popleft()
                deficits[key] -= cost
                taken.append(item)
            if not lane:
                del waiting[key]
    return taken


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), costs), max_size=40),
    st.fixed_dictionaries({key: st.integers(1, 4) for key in "abcd"}),
    st.integers(1, 3000),
)
def test_it_is_deficit_round_robin(requests: list[tuple[str, int]], weights: dict[str, int], quantum: int) -> None:
    queue: FairQueue[int] = FairQueue(quantum)
    lanes: dict[str, list[tuple[int, int]]] = {}
    for item, (key, cost) in enumerate(requests):
        queue.push(item, key=key, cost=cost, weight=weights[key])
        lanes.setdefault(key, []).append((item, cost))
    assert queue.num_tokens == sum(cost for _, cost in requests)
    assert drain(queue) == plain(lanes, weights, quantum)
    assert queue.num_tokens == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=4, max_size=40), st.integers(1, 4), st.integers(1, 4))
def test_two_keys_that_wait_get_their_shares(sizes: list[int], weight_a: int, weight_b: int) -> None:
    """Whatever the sizes: neither gets more than a quantum, and a request of each, ahead of its share."""
    quantum = 1000
    queue: FairQueue[tuple[str, int]] = FairQueue(quantum)
    weights = {"a": weight_a, "b": weight_b}
    served = {"a": 0.0, "b": 0.0}
    cost_of = {"a": cycle(sizes), "b": cycle(reversed(sizes))}
    largest = max(sizes)

    def push(key: str) -> None:
        cost = next(cost_of[key])
        queue.push((key, cost), key=key, cost=cost, weight=weights[key])

    for key in "aabb":
        push(key)
    for _ in range(100):
        key, cost = queue.pop()
        served[key] += cost / weights[key]
        push(key)  # so both wait all the time
        assert abs(served["a"] - served["b"]) <= quantum + largest / weight_a + largest / weight_b


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), costs, st.integers(-3, 3), st.booleans()), max_size=60))
def test_nothing_is_lost_or_doubled(steps: list[tuple[str, int, int, bool]]) -> None:
    queue: FairQueue[int] = FairQueue(500)
    inside: set[int] = set()
    entries = []
    for item, (key, cost, priority, and_pop) in enumerate(steps):
        entries.append(queue.push(item, key=key, cost=cost, priority=priority))
        inside.add(item)
        if priority == 3:
            gone = entries[item // 2]
            assert queue.remove(gone) == (gone.item in inside)
            inside.discard(gone.item)
            assert not queue.remove(gone)
        if priority == -3:
            queue.charge(key, cost)
        if and_pop and inside:
            inside.remove(queue.pop())
        assert len(queue) == len(inside)
        assert queue.num_tokens == sum(steps[each][1] for each in inside)
    assert sorted(drain(queue)) == sorted(inside)
    with pytest.raises(IndexError):
        queue.pop()


def test_priorities_order_the_requests_of_one_key_only() -> None:
    queue: FairQueue[str] = FairQueue(1)
    for item, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        queue.push(item, key="ann", priority=priority)
    queue.push("other", key="bob", priority=-100)
    taken = [queue.pop() for _ in range(5)]
    assert [item for item in taken if item != "other"] == ["high", "first", "second", "low"]
    assert taken.index("other") == 1  # a stranger's priorities are no business of his


def test_nothing_starves_behind_larger_priorities() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("patient", priority=0)
    for turn in range(8):
        queue.push(f"urgent {turn}", priority=9)
    assert [queue.pop() for _ in range(8)][-1] == "patient"


def test_a_key_in_debt_waits_while_others_wait() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for turn in range(3):
        queue.push(f"ann {turn}", key="ann", cost=100)
        queue.push(f"bob {turn}", key="bob", cost=100)
    assert queue.pop() == "ann 0"
    queue.charge("ann", 200)  # its answer was long
    assert [queue.pop() for _ in range(5)] == ["bob 0", "bob 1", "bob 2", "ann 1", "ann 2"]
    queue.charge("ann", 10_000)  # nobody waited: forgotten
    queue.push("ann 3", key="ann", cost=100)
    queue.push("bob 3", key="bob", cost=100)
    assert [queue.pop(), queue.pop()] == ["ann 3", "bob 3"]
