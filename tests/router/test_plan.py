"""Plans and policies: which workers a request gets, mode by mode."""

from __future__ import annotations

import pytest

from cluster.config import Role, RouterConfig
from cluster.protos import worker_pb2 as pb
from router.plan import Candidate, LocalPrefill, LocalReason, NoPlan, Plan
from router.planner import LocalRules, make_plan
from router.policy import POLICIES, LeastLoaded, RoundRobin

BOTH = frozenset({Role.PREFILL, Role.DECODE})


def decode(
    name: str,
    *sources: str,
    num_requests: int = 0,
    connected: bool = True,
    roles: frozenset[Role] = frozenset({Role.DECODE}),
) -> Candidate:
    return Candidate(
        name=name,
        incarnation=name,
        roles=roles,
        warm_sources=dict.fromkeys(sources, 1e9),
        num_requests=num_requests,
        connected=connected,
    )


def prefill(name: str, *, queued_tokens: int = 0, connected: bool = True, compatibility_hash: bytes = b"") -> Candidate:
    return Candidate(
        name=name,
        incarnation=name,
        roles=frozenset({Role.PREFILL}),
        queued_tokens=queued_tokens,
        connected=connected,
        compatibility_hash=compatibility_hash,
    )


def plan(
    *candidates: Candidate,
    mode: LocalPrefill = "fallback",
    spare: bool = True,
    excluded: tuple[str, ...] = (),
    shunned: tuple[str, ...] = (),
) -> Plan | NoPlan:
    rules = LocalRules(mode=mode)
    return make_plan(candidates, LeastLoaded(), local=rules, want_spare=spare, excluded=excluded, shunned=shunned)


def names(made: Plan | NoPlan) -> tuple[str, str, str | None]:
    """(decode, prefill, spare)"""
    assert isinstance(made, Plan), made
    return made.decode.name, made.prefill.name, made.spare.name if made.spare else None


def reason(made: Plan | NoPlan) -> str:
    assert isinstance(made, NoPlan), made
    return made.reason


@pytest.mark.parametrize("mode", ["fallback", "never", "always"])
def test_a_warm_source_is_used_in_every_mode_when_decode_cannot_prefill(mode: LocalPrefill) -> None:
    made = plan(decode("d", "p"), prefill("p"), mode=mode)
    assert names(made) == ("d", "p", None)
    assert isinstance(made, Plan) and made.local_reason is None
    assert made.local_prefill_allowed == (mode != "never")


def test_the_spare_is_another_source() -> None:
    made = plan(decode("d", "p0", "p1"), prefill("p0", queued_tokens=9), prefill("p1"))
    assert names(made) == ("d", "p1", "p0")
    assert names(plan(decode("d", "p0", "p1"), prefill("p0"), prefill("p1"), spare=False))[2] is None


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_sources", [2, 3])
def test_the_choice_of_a_spare_takes_no_turn(policy: str, num_sources: int) -> None:
    """Otherwise every second source would only ever be a spare."""
    sources = [f"p{index}" for index in range(num_sources)]
    chooser = POLICIES[policy](RouterConfig())
    candidates = [decode("d", *sources), *map(prefill, sources)]
    rules = LocalRules(mode="never")
    made = [names(make_plan(candidates, chooser, local=rules, want_spare=True)) for _ in sources * 2]
    assert [source for _, source, _ in made] == sources * 2
    assert {spare for _, _, spare in made} == set(sources)


def test_only_warm_connected_equal_sources_are_paired() -> None:
    cold, lost, other = prefill("p0"), prefill("p1", connected=False), prefill("p2", compatibility_hash=b"x")
    worker = decode("d", "p1", "p2")
    assert "no prefill worker is warm" in reason(plan(worker, cold, lost, other, mode="never"))
    made = plan(worker, cold, lost, other)
    assert names(made) == ("d", "d", None)
    assert isinstance(made, Plan) and made.local_reason is LocalReason.NO_SOURCE and made.local_prefill_allowed


def test_a_decode_worker_with_a_warm_source_comes_before_one_without() -> None:
    assert names(plan(decode("d0"), decode("d1", "p", num_requests=50), prefill("p"))) == ("d1", "p", None)


def test_always_binds_prefill_to_a_decode_worker_with_both_roles() -> None:
    mixed = decode("m0", "m1", roles=BOTH), decode("m1", "m0", roles=BOTH, num_requests=1)
    made = plan(*mixed, mode="always")
    assert names(made) == ("m0", "m0", None)
    assert isinstance(made, Plan) and made.local_reason is LocalReason.CONFIGURED
    assert names(plan(*mixed, mode="fallback")) == ("m0", "m1", None)
    assert names(plan(*mixed, mode="never")) == ("m0", "m1", None)


def test_always_works_without_any_prefill_worker() -> None:
    assert names(plan(decode("d"), mode="always")) == ("d", "d", None)


def test_excluded_workers_are_never_chosen_and_shunned_ones_last() -> None:
    workers = decode("d0", "p"), decode("d1", "p", num_requests=5), prefill("p")
    assert names(plan(*workers, excluded=("d0",)))[0] == "d1"
    assert names(plan(*workers, shunned=("d0",)))[0] == "d1"
    assert names(plan(*workers, excluded=("d1",), shunned=("d0",)))[0] == "d0"
    made = plan(*workers, excluded=("d0", "d1"))
    assert isinstance(made, NoPlan) and made.exhausted


def test_no_plan_says_why() -> None:
    assert reason(plan()) == "no decode worker is ready"
    assert reason(plan(prefill("p"))) == "no decode worker is ready"
    made = plan(decode("d", connected=False))
    assert reason(made) == "no session to any decode worker is open"
    assert isinstance(made, NoPlan) and not made.exhausted


def test_a_plan_on_the_wire_names_workers_by_incarnation() -> None:
    made = plan(decode("d", "p0", "p1"), prefill("p0"), prefill("p1", queued_tokens=1))
    assert isinstance(made, Plan)
    wire = made.wire()
    assert [(s.stage, s.worker.incarnation, s.spare.incarnation) for s in wire.stages] == [
        (pb.PREFILL, "p0", "p1"),
        (pb.DECODE, "d", ""),
    ]
    assert wire.local_prefill_allowed and not wire.stages[1].HasField("spare")


def test_round_robin_takes_turns_per_stage() -> None:
    policy, workers = RoundRobin(), [decode("a"), decode("b"), decode("c")]
    assert [policy.pick(Role.DECODE, workers).name for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.pick(Role.PREFILL, workers).name == "a"
    assert policy.pick(Role.DECODE, workers[:1]).name == "a"


def test_least_loaded_weighs_requests_for_decode_and_tokens_for_prefill() -> None:
    busy = Candidate(name="a", incarnation="a", roles=BOTH, num_requests=2, queued_tokens=10)
    long = Candidate(name="b", incarnation="b", roles=BOTH, num_requests=1, queued_tokens=9000)
    policy = LeastLoaded()
    assert policy.pick(Role.DECODE, [busy, long]) is long
    assert policy.pick(Role.PREFILL, [busy, long]) is busy


def test_least_loaded_takes_turns_among_equals() -> None:
    policy, workers = LeastLoaded(), [decode("a"), decode("b"), decode("c", num_requests=1)]
    assert [policy.pick(Role.DECODE, workers).name for _ in range(4)] == ["a", "b", "a", "b"]


def test_every_configured_policy_exists() -> None:
    annotation = RouterConfig.model_fields["policy"].annotation
    assert sorted(POLICIES) == sorted(annotation.__args__)  # type: ignore[union-attr]
