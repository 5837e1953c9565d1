from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Role
from cluster.membership import Member, MemberState
from cluster.reconcile import Actions, Standing, Wanted, backoff_s, decide, serves

WANTED = Wanted(num_workers=1, fingerprint="new")
SURGE_S = 3.0


def worker(incarnation: str = "a", **changes: object) -> Standing:
    base = Standing(
        incarnation=incarnation, index=0, fingerprint="new", state=MemberState.READY, placed=True, age_s=0.0
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def act(*standing: Standing, wanted: Wanted = WANTED, not_before: dict[int, float] | None = None) -> Actions:
    return decide(standing, wanted, 100.0, not_before or {}, SURGE_S)


def test_empty_places_are_filled_all_at_once_but_not_before_their_time() -> None:
    three = replace(WANTED, num_workers=3)
    assert act(wanted=three) == Actions(start=(0, 1, 2))
    assert act(wanted=three, not_before={1: 100.1}) == Actions(start=(0, 2))
    assert act(worker(state=MemberState.DRAINING)) == Actions(start=(0,))


def test_places_past_the_wanted_number_are_drained() -> None:
    assert act(worker("a"), worker("b", index=1)) == Actions(drain=("b",))


def test_a_stale_worker_serves_until_its_successor_is_ready() -> None:
    old = worker("old", fingerprint="old")
    assert act(old) == Actions(start=(0,))
    assert act(old, worker("new", state=MemberState.STARTING)) == Actions()
    assert act(old, worker("new")) == Actions(drain=("old",))


def test_a_successor_without_room_gets_the_place_of_the_stale_worker() -> None:
    old = worker("old", fingerprint="old")
    waiting = worker("new", state=MemberState.STARTING, placed=False)
    assert act(old, replace(waiting, age_s=SURGE_S - 0.1)) == Actions()
    assert act(old, replace(waiting, age_s=SURGE_S)) == Actions(drain=("old",))


def test_a_worker_whose_node_is_to_go_is_replaced_and_waits_for_no_other() -> None:
    two = replace(WANTED, num_workers=2, keeps_stale=True)
    going = worker("a", leaving=True)
    assert act(going, worker("b", index=1, leaving=True), wanted=two) == Actions(start=(0, 1))
    waiting = worker("c", state=MemberState.STARTING, placed=False)
    assert act(going, worker("b", index=1), waiting, wanted=two) == Actions()
    assert act(going, worker("b", index=1), replace(waiting, age_s=SURGE_S), wanted=two) == Actions(drain=("a",))
    assert act(going, worker("b", index=1), worker("c"), wanted=two) == Actions(drain=("a",))
    assert act(replace(going, state=MemberState.STARTING)) == Actions(start=(0,), drain=("a",))


def test_a_stale_worker_of_other_weights_stays_until_the_new_weights_serve_in_all_roles() -> None:
    old = worker("old", fingerprint="old", compatibility_hash=b"old")
    new = worker("new", compatibility_hash=b"new")
    keeping = replace(WANTED, keeps_stale=True)
    assert act(old, new, wanted=keeping) == Actions()
    assert act(old, new) == Actions(drain=("old",))
    assert act(replace(old, compatibility_hash=b"new"), new, wanted=keeping) == Actions(drain=("old",))
    waiting = worker("new", state=MemberState.STARTING, placed=False, age_s=SURGE_S)  # there is no room for both
    assert act(old, waiting, wanted=keeping) == Actions(drain=("old",))


def test_weights_serve_when_ready_workers_of_one_hash_have_all_roles() -> None:
    def member(role: Role, compatibility_hash: bytes, state: MemberState = MemberState.READY) -> Member:
        return Member(
            name=f"{role}-{compatibility_hash}", pool=role, incarnation=f"{role}{compatibility_hash}", address="",
            roles=(role,), compatibility_hash=compatibility_hash, state=state,
        )  # fmt: skip

    roles = {Role.PREFILL, Role.DECODE}
    prefill, decode = member(Role.PREFILL, b"new"), member(Role.DECODE, b"new")
    assert serves([prefill, decode], roles)
    assert not serves([prefill], roles)
    assert not serves([prefill, member(Role.DECODE, b"old")], roles)
    assert not serves([prefill, member(Role.DECODE, b"new", MemberState.STARTING)], roles)
    assert serves([member(Role.DECODE, b"new")], {Role.DECODE})


def test_a_worker_takes_the_roles_that_are_wanted_in_its_place_and_is_not_replaced() -> None:
    wanted = Wanted(num_workers=2, fingerprint="new", roles=((Role.PREFILL,), (Role.DECODE,)))
    first = worker("a", roles=(Role.DECODE,))
    second = worker("b", index=1, roles=(Role.DECODE,))
    assert act(first, second, wanted=wanted) == Actions(switch=(0,))
    assert act(replace(first, roles=(Role.PREFILL,)), second, wanted=wanted) == Actions()


def test_stale_workers_are_replaced_one_at_a_time() -> None:
    wanted = replace(WANTED, num_workers=3)
    old = [worker(f"old{i}", fingerprint="old", index=i) for i in range(3)]
    assert act(*old, wanted=wanted) == Actions(start=(0,))
    assert act(*old, worker("n", state=MemberState.STARTING), wanted=wanted) == Actions()
    assert act(*old, worker("n"), wanted=wanted) == Actions(start=(1,), drain=("old0",))


def test_a_stale_worker_that_never_got_ready_makes_way_at_once() -> None:
    assert act(worker("old", fingerprint="old", state=MemberState.STARTING)) == Actions(start=(0,), drain=("old",))


def test_of_two_workers_in_one_place_the_ready_one_stays() -> None:
    assert act(worker("a", state=MemberState.STARTING), worker("b")) == Actions(drain=("a",))


def test_the_first_failure_costs_nothing_and_the_pause_is_bounded() -> None:
    pauses = [backoff_s(n) for n in range(1, 40)]
    assert pauses[0] == 0 < pauses[1]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 30.0


STANDING = st.builds(
    Standing,
    incarnation=st.just(""),
    index=st.integers(0, 4),
    fingerprint=st.sampled_from(["old", "new"]),
    state=st.sampled_from(MemberState),
    placed=st.booleans(),
    age_s=st.floats(0, 10),
)


@given(st.lists(STANDING, max_size=8), st.integers(0, 5))
def test_a_pool_settles_without_ever_draining_its_last_serving_worker(drawn: list[Standing], num: int) -> None:
    """Acting on every decision, with starts that succeed and drains that end, leads to what is wanted."""
    standing = [replace(w, incarnation=str(i)) for i, w in enumerate(drawn) if w.state is not MemberState.GONE]
    wanted = Wanted(num_workers=num, fingerprint="new")
    for round_ in range(20):
        actions = act(*standing, wanted=wanted)
        assert len(set(actions.start)) == len(actions.start)
        assert len(set(actions.drain)) == len(actions.drain)
        for index in {w.index for w in standing if w.index < num and w.state is MemberState.READY}:
            left = [w for w in standing if w.index == index and w.live and w.incarnation not in actions.drain]
            assert left, "a served place was emptied"
        standing = [replace(w, state=MemberState.READY, placed=True) for w in standing if w.live]
        standing = [w for w in standing if w.incarnation not in actions.drain]
        standing += [
            worker(f"{round_}.{index}", index=index, state=MemberState.STARTING, placed=False)
            for index in actions.start
        ]
    assert act(*standing, wanted=wanted) == Actions()
    assert sorted(w.index for w in standing) == list(range(num))
    assert {w.fingerprint for w in standing} <= {"new"}
