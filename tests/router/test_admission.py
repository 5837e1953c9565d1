"""Who runs, who waits, who is refused; and that a step of load is taken without swinging. Virtual time throughout."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import LimitsConfig, Role
from cluster.errors import Busy
from router.admission import Admission, Applicant, Place, State
from router.forecast import Outlook, outlook
from router.plan import Candidate


def admission(max_requests: int, max_queued: int = 0) -> Admission:
    return Admission(LimitsConfig(max_requests=max_requests, max_queued=max_queued))


def applicant(**options: object) -> Applicant:
    return replace(Applicant(admit=lambda: None), **options)  # type: ignore[arg-type]


def test_those_beyond_the_limit_wait_and_those_beyond_the_queue_are_refused() -> None:
    desk = admission(max_requests=2, max_queued=1)
    admitted: list[str] = []
    places = [desk.enter(applicant(admit=lambda n=name: admitted.append(n)), 0.0) for name in "abc"]
    assert admitted == ["a", "b"] and (desk.num_open, desk.num_waiting) == (3, 1)
    with pytest.raises(Busy, match="2 requests are open here and the limit is 2 and 1 wait, the limit of which is 1"):
        desk.enter(applicant(), 0.0)
    desk.leave(places[0], 1.0)
    desk.leave(places[0], 1.0)  # once
    assert admitted == ["a", "b", "c"] and desk.num_open == 2
    desk.leave(places[2], 2.0)
    desk.leave(places[1], 2.0)
    assert desk.num_open == 0


def test_who_leaves_while_waiting_takes_no_turn() -> None:
    desk = admission(max_requests=1, max_queued=2)
    admitted: list[str] = []
    first, gone, last = (desk.enter(applicant(admit=lambda n=name: admitted.append(n)), 0.0) for name in "abc")
    desk.leave(gone, 0.5)
    desk.leave(first, 1.0)
    assert admitted == ["a", "c"] and last.state is State.RUNNING and gone.state is State.GONE


def test_limits_are_divided_by_the_live_replicas() -> None:
    desk = admission(max_requests=8, max_queued=5)
    assert (desk.max_running, desk.max_waiting) == (8, 5)
    desk.set_replicas(3, 0.0)
    assert (desk.max_running, desk.max_waiting) == (2, 2)
    desk.set_replicas(100, 0.0)
    assert (desk.max_running, desk.max_waiting) == (1, 1)
    first, second = desk.enter(applicant(), 0.0), desk.enter(applicant(), 0.0)
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    desk.set_replicas(4, 0.0)  # a replica went: there is room for those that wait
    assert second.state is State.RUNNING


def test_clients_share_what_there_is() -> None:
    """One floods the queue, the other comes later with a tenth: they alternate."""
    desk = admission(max_requests=1, max_queued=100)
    admitted: list[str] = []

    def enter(client: str) -> Place:
        return desk.enter(applicant(admit=lambda: admitted.append(client), client=client, num_tokens=2048), 0.0)

    places = [enter("flood") for _ in range(40)] + [enter("few") for _ in range(4)]
    for now in range(9):
        desk.leave(next(place for place in places if place.state is State.RUNNING), float(now))
    assert admitted[:9].count("few") == 4


def test_what_an_answer_costs_counts_for_its_client_while_others_wait() -> None:
    desk = admission(max_requests=1, max_queued=100)
    admitted: list[str] = []
    places: list[Place] = []
    for client in ("long", "long", "short", "short", "short"):
        places.append(
            desk.enter(applicant(admit=lambda c=client: admitted.append(c), client=client, num_tokens=2048), 0.0)
        )
    desk.generated(places[0], 4096)  # two turns of the others
    for _ in range(4):
        desk.leave(next(place for place in places if place.state is State.RUNNING), 1.0)
    assert admitted == ["long", "short", "short", "long", "short"]


def test_a_first_token_that_comes_too_late_is_refused_at_once() -> None:
    desk = admission(max_requests=1, max_queued=10)
    with pytest.raises(Busy, match=r"expected in 3.0 s and wanted within 2 s") as refused:
        desk.enter(applicant(within_s=2.0), 0.0, Outlook(3.0))
    assert (refused.value.limit, refused.value.retry_after_s) == ("predicted_ttft", 1.0)
    running = desk.enter(applicant(within_s=2.0), 0.0, Outlook(2.0))
    desk.leave(running, 4.0)  # so a place is free every 4 s
    desk.enter(applicant(), 4.0)
    desk.enter(applicant(within_s=5.0), 4.0, Outlook(1.0))
    with pytest.raises(Busy, match=r"expected in 9.0 s"):
        desk.enter(applicant(within_s=5.0), 4.0, Outlook(1.0))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "leave", "replicas"]), st.sampled_from("abc"), st.integers(0, 20)),
        max_size=80,
    )
)
def test_nothing_is_lost_and_no_place_stays_empty_while_somebody_waits(steps: list[tuple[str, str, int]]) -> None:
    desk = admission(max_requests=6, max_queued=8)
    places: list[Place] = []
    admits = 0

    def admit() -> None:
        nonlocal admits
        admits += 1

    for now, (what, client, number) in enumerate(steps):
        if what == "enter":
            try:
                places.append(desk.enter(applicant(admit=admit, client=client, num_tokens=number), float(now)))
            except Busy:
                assert desk.num_waiting >= desk.max_waiting
        elif what == "replicas":
            desk.set_replicas(number % 4, float(now))
        elif places:
            desk.leave(places[number % len(places)], float(now))
        states = [place.state for place in places]
        assert desk.num_waiting == states.count(State.WAITING)
        assert desk.num_open == desk.num_waiting + states.count(State.RUNNING)
        assert not desk.num_waiting or states.count(State.RUNNING) >= desk.max_running
    for place in places:
        desk.leave(place, 1000.0)
    assert desk.num_open == 0
    assert admits <= len(places)


# ---------------------------------------------------------------- what can be expected


def source(queued_tokens: int, rate: float, *roles: Role) -> Candidate:
    name = f"w{queued_tokens}"
    return Candidate(
        name=name,
        incarnation=name,
        roles=frozenset(roles or {Role.PREFILL}),
        queued_tokens=queued_tokens,
        prefill_tokens_per_s=rate,
    )


def test_the_first_token_is_expected_from_the_least_busy_source() -> None:
    fleet = [source(4000, 1000.0), source(9000, 3000.0), source(0, 0.0, Role.DECODE)]
    assert outlook(1000, fleet) == (10_000 / 3000, 1000, 4000.0)
    assert outlook(1000, []) == Outlook()
    assert outlook(1000, [*fleet, source(50_000, 0.0)]) == Outlook()  # that one has not measured anything yet
    assert outlook(1000, [source(1000, 500.0, Role.DECODE)]).first_token_s == 4.0  # nobody prefills: decode workers do


# ---------------------------------------------------------------- a step of load


@dataclass
class Source:
    """A prefill worker: a queue worked off at a constant rate, told every `REPORT_S`."""

    rate: float
    done_at: float = 0.0  # when what it has now is done

    def queued_tokens(self, now: float) -> int:
        return round(max(0.0, self.done_at - now) * self.rate)

    def take(self, num_tokens: int, now: float) -> float:
        self.done_at = max(now, self.done_at) + num_tokens / self.rate
        return self.done_at


@dataclass
class Replica:
    desk: Admission
    reported: list[int]
    sent: list[int]  # since the last report, as router/fleet.py counts it

    def sees(self, sources: Sequence[Source]) -> list[Candidate]:
        return [source(self.reported[index] + self.sent[index], each.rate) for index, each in enumerate(sources)]


REPORT_S = 0.1
TRAVEL_S = 0.02  # of a report: what was sent meanwhile is not in it, and not counted either


@dataclass
class World:
    """Replicas that see their sources through reports only, in virtual time."""

    num_replicas: int
    sources: list[Source]
    limits: LimitsConfig
    within_s: float
    now: float = 0.0
    accepted: list[tuple[float, float]] = field(default_factory=list)  # when it came, when its first token did
    num_refused: int = 0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        blank = [0] * len(self.sources)
        self.replicas = [Replica(Admission(self.limits), [*blank], [*blank]) for _ in range(self.num_replicas)]
        for replica in self.replicas:
            replica.desk.set_replicas(self.num_replicas, 0.0)
        for index in range(len(self.sources)):
            self.at(0.0, lambda index=index: self._tell(index))

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), call))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, call = heapq.heappop(self._events)
            call()

    def offer(self, start: float, end: float, per_s: float, num_tokens: int) -> None:
        for number in range(round((end - start) * per_s)):
            replica = self.replicas[number % self.num_replicas]
            self.at(start + number / per_s, lambda replica=replica: self._arrive(replica, num_tokens))

    def per_second(self, start: int, end: int) -> list[int]:
        return [sum(second <= came < second + 1 for came, _ in self.accepted) for second in range(start, end)]

    def _tell(self, index: int) -> None:
        queued = self.sources[index].queued_tokens(self.now)

        def hear() -> None:
            for replica in self.replicas:
                replica.reported[index], replica.sent[index] = queued, 0

        self.at(self.now + TRAVEL_S, hear)
        self.at(self.now + REPORT_S, lambda: self._tell(index))

    def _arrive(self, replica: Replica, num_tokens: int) -> None:
        came = self.now

        def admit() -> None:
            seen = replica.sees(self.sources)
            index = min(range(len(seen)), key=lambda i: (seen[i].queued_tokens + num_tokens) / self.sources[i].rate)
            first_at = self.sources[index].take(num_tokens, self.now)
            replica.sent[index] += num_tokens
            self.accepted.append((came, first_at))
            self.at(first_at + 0.5, lambda: replica.desk.leave(place, self.now))  # and some decoding

        expected = outlook(num_tokens, replica.sees(self.sources))
        wanted = applicant(admit=admit, num_tokens=num_tokens, within_s=self.within_s)
        try:
            place = replica.desk.enter(wanted, came, expected)
        except Busy:
            self.num_refused += 1


@pytest.mark.parametrize("num_replicas", [1, 8])
@pytest.mark.parametrize("overload", [1.5, 5.0])
def test_a_step_of_load_settles(num_replicas: int, overload: float) -> None:
    """Half the capacity, then `overload` times it, then half again. 4 sources can begin 160 requests a second."""
    limits = LimitsConfig(max_requests=4000, max_queued=0)
    world = World(num_replicas, [Source(10_000.0) for _ in range(4)], limits, within_s=2.0)
    world.offer(0, 5, 80, 250)
    world.offer(5, 20, 160 * overload, 250)
    world.offer(20, 25, 80, 250)
    world.run(30)
    assert world.per_second(0, 5) == [80] * 5  # nobody is refused for nothing
    assert world.per_second(22, 25) == [80] * 3  # nor afterwards
    settled = world.per_second(10, 20)
    assert sum(settled) / len(settled) == pytest.approx(160, rel=0.03)  # what comes in is what is done
    assert all(abs(each - 160) <= 8 + num_replicas for each in settled), settled
    waits = [first_at - came for came, first_at in world.accepted if 10 <= came < 20]
    assert min(waits) > 1.0 and max(waits) < 2.0 + REPORT_S, (min(waits), max(waits))  # never idle, never late


def test_a_step_of_load_settles_in_the_queue() -> None:
    """Where places are what is short: the queue fills, stays full, and empties again; each is served in time."""
    world = World(2, [Source(1e9)], LimitsConfig(max_requests=20, max_queued=40), within_s=60.0)
    world.offer(0, 10, 20, 10)  # each holds its place for 0.5 s: 40 a second can
    world.offer(10, 30, 120, 10)
    world.offer(30, 40, 20, 10)
    world.run(60)
    assert world.per_second(0, 10) == [20] * 10
    settled = world.per_second(13, 29)
    assert min(settled) >= 38 and max(settled) <= 42, settled
    assert sum(replica.desk.num_open for replica in world.replicas) == 0
    assert len(world.accepted) + world.num_refused == 200 + 2400 + 200
