"""Whether a plan says to fetch, and from whom: against the arithmetic done plainly."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Role
from router.holding import spared_blocks
from router.offer import Demand
from router.pairing import ASK_S, Pairing
from router.plan import Candidate, Plan
from router.planner import LocalRules, make_plan
from router.policy import KvAware

BLOCK = 16
BYTES = 1000.0
NUM_TOKENS = 10 * BLOCK + 1


def worker(
    name: str, role: Role, warm: dict[str, float], *, speed: float = 0.0, compatible: bytes = b"", requests: int = 0
) -> Candidate:
    return Candidate(
        name=name,
        incarnation=name,
        roles=frozenset({role}),
        warm_sources=warm,
        prefill_tokens_per_s=speed,
        block_bytes=int(BYTES),
        compatibility_hash=compatible,
        num_requests=requests,
    )


def planned(
    candidates: list[Candidate], hits: list[int], *, computes_all: bool = False, may_fetch: bool = True
) -> Plan:
    """One decode worker, d, and one source, p, that it reads at an unknown rate; others only hold."""
    demand = Demand(
        num_tokens=NUM_TOKENS,
        block_size=BLOCK,
        hit_blocks=np.array(hits),
        computes_all=computes_all,
        may_fetch=may_fetch,
    )
    plan = make_plan(candidates, KvAware(), local=LocalRules(mode="never"), want_spare=False, demand=demand)
    assert isinstance(plan, Plan) and (plan.decode.name, plan.prefill.name) == ("d", "p")
    return plan


def fetching(*, speed: float, rate: float, hits: tuple[int, int] = (10, 0), **options: bool) -> Plan:
    """p computes, d may hold."""
    candidates = [worker("d", Role.DECODE, {"p": 0.0}), worker("p", Role.PREFILL, {"d": rate}, speed=speed)]
    return planned(candidates, list(hits), **options)


def test_a_prefix_is_fetched_where_that_is_quicker() -> None:
    compute_s = 10 * BLOCK / 160  # a second
    slow, quick = (10 * BYTES / (compute_s - ASK_S) * factor for factor in (0.99, 1.01))
    assert fetching(speed=160, rate=slow).holding is None
    plan = fetching(speed=160, rate=quick)
    assert plan.holding is not None and (plan.holding.holder.name, plan.holding.num_blocks) == ("d", 10)
    stage = next(stage for stage in plan.wire().stages if stage.HasField("holding"))
    assert (stage.worker.name, stage.holding.holder.name, stage.holding.num_blocks) == ("p", "d", 10)
    assert fetching(speed=10 * BLOCK / ASK_S, rate=inf).holding is None  # the words alone take as long
    assert fetching(speed=0, rate=1.0).holding is not None  # it has computed nothing yet
    assert fetching(speed=160, rate=inf, hits=(10, 10)).holding is None
    assert fetching(speed=160, rate=inf, hits=(10, 9)).holding is not None
    assert fetching(speed=160, rate=inf, computes_all=True).holding is None
    unfetched = fetching(speed=160, rate=inf, may_fetch=False)
    assert unfetched.holding is None and unfetched.choice is not None
    assert unfetched.choice.offer.spared.tolist() == [10, 0], "what is not fetched spares nothing"


def test_only_compatible_and_warm_peers_are_asked_the_least_busy_first() -> None:
    candidates = [
        worker("d", Role.DECODE, {"p": 0.0}, compatible=b"a"),
        worker("p", Role.PREFILL, {"other": 1e9, "busy": 1e9, "idle": 1e9}, speed=160, compatible=b"a"),
        worker("other", Role.DECODE, {}, compatible=b"b"),
        worker("cold", Role.DECODE, {}, compatible=b"a"),
        worker("busy", Role.DECODE, {}, compatible=b"a", requests=9),
        worker("idle", Role.DECODE, {}, compatible=b"a", requests=1),
    ]
    assert planned(candidates, [10, 0, 10, 10, 0, 0]).holding is None
    for hits, chosen in (([0, 0, 10, 10, 8, 8], "idle"), ([0, 0, 10, 10, 9, 8], "busy")):
        plan = planned(candidates, hits)
        assert plan.holding is not None and plan.holding.holder.name == chosen


rates = st.sampled_from([None, 0.0, 1e4, 1e6, 1e9])


@settings(max_examples=100)
@given(data=st.data(), num_workers=st.integers(1, 5))
def test_what_a_fetch_spares(data: st.DataObject, num_workers: int) -> None:
    candidates: list[Candidate] = []
    for me in range(num_workers):
        drawn = {f"w{other}": data.draw(rates) for other in range(num_workers)}
        warm = {name: rate for name, rate in drawn.items() if rate is not None}
        candidates.append(worker(f"w{me}", Role.PREFILL, warm, speed=data.draw(st.sampled_from([0.0, 100.0, 1e5]))))
    hits = np.array([data.draw(st.integers(0, 10)) for _ in candidates], np.int64)
    most = int(hits.argmax())
    expected: list[float] = []
    for candidate, hit in zip(candidates, hits.tolist(), strict=True):
        gap, rate = int(hits[most]) - hit, candidate.warm_sources.get(f"w{most}")
        if rate is None or candidate is candidates[most]:
            expected.append(hit)
            continue
        fetch_s = ASK_S + (gap * BYTES / rate if rate else 0.0)
        expected.append(hit + max(0.0, gap - fetch_s * candidate.prefill_tokens_per_s / BLOCK))
    if not hits.any():
        expected = [0.0] * num_workers
    assert spared_blocks(hits, BLOCK, Pairing(candidates)) == pytest.approx(expected)
