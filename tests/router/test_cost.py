"""What ways cost, which one each policy takes, and when a decode worker computes the prompt itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Role, RouterConfig
from router.cost import Weights, costs_of, total_of
from router.offer import Choice, Demand, Offer, Policy
from router.pairing import ASK_S, Pairing
from router.plan import Candidate, LocalPrefill, LocalReason, Plan
from router.planner import LocalRules, make_plan
from router.policy import POLICIES, KvAware, at_home

BLOCK = 16


def decode(name: str, sources: dict[str, float], *, roles: Sequence[Role] = (Role.DECODE,), **load: Any) -> Candidate:
    return Candidate(name=name, incarnation=name, roles=frozenset(roles), warm_sources=sources, **load)


def prefill(name: str, queued_tokens: int = 0, *, speed: float = 0.0) -> Candidate:
    roles = frozenset({Role.PREFILL})
    return Candidate(name=name, incarnation=name, roles=roles, queued_tokens=queued_tokens, prefill_tokens_per_s=speed)


def demand(num_tokens: int, hits: Sequence[int], *, session: str = "", computes_all: bool = False) -> Demand:
    return Demand(
        num_tokens=num_tokens,
        block_size=BLOCK,
        hit_blocks=np.array(hits),
        session=session,
        computes_all=computes_all,
    )


def planned(
    candidates: Sequence[Candidate],
    wanted: Demand,
    *,
    policy: Policy | None = None,
    mode: LocalPrefill = "fallback",
    **rules: int,
) -> Plan:
    made = make_plan(
        candidates,
        policy or KvAware(),
        local=LocalRules(mode=mode, **rules),
        want_spare=False,
        demand=wanted,
    )
    assert isinstance(made, Plan), made
    return made


def names(plan: Plan) -> tuple[str, str]:
    return plan.decode.name, plan.prefill.name


# ---------------------------------------------------------------- costs, by hand


def test_the_terms_of_a_cost() -> None:
    """Ten blocks and five tokens: of them d0 has 4, p1 all that may be hit, which d0 may fetch."""
    rates = {"p0": 1e6, "p1": 0.0}
    candidates = [
        decode("d0", rates, num_requests=3, num_available_blocks=5, block_bytes=1000, prefill_tokens_per_s=320.0),
        decode("d1", {"p0": 0.0}, num_requests=1, queued_tokens=64),
        prefill("p0", 32, speed=160.0),
        prefill("p1", 320),
    ]
    wanted = demand(165, [4, 0, 2, 11])
    offer = Offer.of(candidates, Pairing(candidates), np.ones((2, 3), np.bool_), wanted)
    costs = costs_of(offer, Weights(prefill=2.0, decode=0.5))
    local = 0.3125 + ASK_S * 20, 10.3125
    assert costs.prefill == pytest.approx(2 * np.array([[8.3125, 0.3125, local[0]], [8.3125, 0.3125, local[1]]]))
    assert costs.queue.tolist() == [[2, 20, 0], [2, 20, 4]]
    assert costs.decode.tolist() == [[1.5 + 2] * 3, [0.5] * 3]  # d0 lacks 7 blocks and has room for 5
    assert costs.transfer == pytest.approx(np.array([[7 * 1000 / 1e6 * 10, 0, 0], [0, 0, 0]]))
    assert costs.total == pytest.approx(costs.prefill + costs.queue + costs.decode + costs.transfer)


def test_what_needs_every_position_computes_every_position() -> None:
    candidates = [decode("d0", {"p0": 1.0}), prefill("p0")]
    pairing, ways = Pairing(candidates), np.ones((1, 2), np.bool_)
    wanted = demand(160, [5, 5], computes_all=True)
    costs = costs_of(Offer.of(candidates, pairing, ways, wanted))
    assert costs.prefill.tolist() == [[10, 10]]
    assert planned(candidates, wanted, mode="conditional", max_tokens=80).local_reason is None


workers = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 4000), st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(sinks=workers, sources=workers, num_tokens=st.integers(1, 200), data=st.data())
def test_the_chosen_way_is_the_cheapest_of_those_that_fit(
    sinks: list[tuple[int, int, int, int]],
    sources: list[tuple[int, int, int, int]],
    num_tokens: int,
    data: st.DataObject,
) -> None:
    """Against a plain loop over the pairs."""
    candidates: list[Candidate] = []
    for index, (num_requests, queued, _, available) in enumerate(sinks):
        warm = data.draw(st.dictionaries(st.integers(0, len(sources) - 1), st.sampled_from((0.0, 1e3, 1e6))))
        rates = {f"p{source}": rate for source, rate in warm.items()}
        candidates.append(
            decode(
                f"d{index}",
                rates,
                num_requests=num_requests,
                queued_tokens=queued,
                num_available_blocks=available,
                block_bytes=100,
            )
        )
    candidates += [prefill(f"p{index}", queued, speed=500.0) for index, (_, queued, _, _) in enumerate(sources)]
    hits = [worker[2] for worker in (*sinks, *sources)]
    wanted = demand(num_tokens, hits)
    reusable = (num_tokens - 1) // BLOCK

    def price(d: int, p: int) -> float:
        sink, source = candidates[d], candidates[len(sinks) + p]
        missing = -(-num_tokens // BLOCK) - min(hits[d], reusable)
        rate = sink.warm_sources[source.name]
        moved = missing * 100 / rate * 500 / BLOCK if rate else 0.0
        waiting = max(0, missing - (sink.num_available_blocks or 0))
        left = num_tokens / BLOCK - min(hits[len(sinks) + p], reusable)
        return left + source.queued_tokens / BLOCK + sink.num_requests + waiting + moved

    pairing, weights = Pairing(candidates), Weights(prefill=2.0, decode=0.5)
    for hungry in (wanted, replace(wanted, computes_all=True)):
        ways = np.ones((len(sinks), len(sources) + 1), np.bool_)
        offer = Offer.of(candidates, pairing, ways, hungry)
        assert total_of(offer, weights) == pytest.approx(costs_of(offer, weights).total)

    prices = {
        (d, p): price(d, p)
        for d in range(len(sinks))
        for p in range(len(sources))
        if f"p{p}" in candidates[d].warm_sources
    }
    plan = planned(candidates, wanted)
    if not prices:
        assert plan.local_reason is LocalReason.NO_SOURCE
        return
    way = int(plan.decode.name[1:]), int(plan.prefill.name[1:])
    assert prices[way] == pytest.approx(min(prices.values()))


# ---------------------------------------------------------------- choices


def pool(num_decodes: int = 3, num_sources: int = 3, **load: Any) -> list[Candidate]:
    sources = [prefill(f"p{index}") for index in range(num_sources)]
    rates = {source.name: 1e9 for source in sources}
    return [*(decode(f"d{index}", rates, **load) for index in range(num_decodes)), *sources]


def test_a_prefix_draws_until_its_worker_has_too_much_to_do() -> None:
    candidates = pool()
    hits = [0, 0, 0, 0, 8, 0]
    assert names(planned(candidates, demand(160, hits)))[1] == "p1"
    candidates[4] = prefill("p1", 7 * BLOCK)
    assert names(planned(candidates, demand(160, hits)))[1] == "p1"
    candidates[4] = prefill("p1", 9 * BLOCK)
    assert names(planned(candidates, demand(160, hits)))[1] != "p1"


def test_equal_ways_take_turns_over_both_stages() -> None:
    policy, candidates = KvAware(), pool()
    made = [names(planned(candidates, demand(160, [0] * 6), policy=policy)) for _ in range(6)]
    assert Counter(name for name, _ in made) == {"d0": 2, "d1": 2, "d2": 2}
    assert Counter(name for _, name in made) == {"p0": 2, "p1": 2, "p2": 2}
    successors = [decode(f"d{index}", {f"q{index}": 1e9}) for index in range(3)]
    for turn in range(40):  # workers that are gone are forgotten
        planned([*successors, prefill(f"q{turn % 3}")], demand(16, [0] * 4), policy=policy)
    assert len(policy._turns) <= 18


def test_a_temperature_draws_dearer_ways_by_their_cost() -> None:
    policy = KvAware(temperature=2.0, seed=1)
    candidates = pool(1, 2)
    candidates[2] = prefill("p1", 3 * BLOCK)
    made = Counter(names(planned(candidates, demand(16, [0] * 3), policy=policy))[1] for _ in range(1500))
    assert made["p1"] / made["p0"] == pytest.approx(exp(-3 / 2), rel=0.2)
    assert Counter(names(planned(candidates, demand(16, [0] * 3)))[1] for _ in range(50)) == {"p0": 50}


@pytest.mark.parametrize("name", POLICIES)
def test_a_session_stays_where_every_router_puts_it(name: str) -> None:
    """And when its worker leaves, only its own sessions move."""
    config, candidates = RouterConfig(affinity_blocks=4.0), pool(4, 4)
    homes: dict[str, tuple[str, str]] = {}
    for number in range(40):
        session = f"s{number}"
        wanted = demand(16, [0] * 8, session=session)
        routers = [POLICIES[name](config) for _ in range(2)]
        made = {names(planned(candidates, wanted, policy=policy)) for policy in routers for _ in range(3)}
        (homes[session],) = made
    assert len(set(homes.values())) > 8
    policy = POLICIES[name](config)
    for session, (home, source) in homes.items():
        wanted = demand(16, [0] * 7, session=session)
        moved = names(planned(candidates[1:], wanted, policy=policy))
        assert moved[1] == source and (home == "d0" or moved[0] == home)


def test_a_session_leaves_a_worker_that_is_much_dearer() -> None:
    candidates, session = pool(2, 1), "s"
    home = at_home(session, candidates[:2])
    other = candidates[1 - candidates.index(home)]
    policy = KvAware(affinity_blocks=4.0)
    for load, expected in ((4, home.name), (5, other.name)):
        busy = [decode(c.name, {"p0": 1e9}, num_requests=load if c is home else 0) for c in candidates[:2]]
        wanted = demand(16, [0] * 3, session=session)
        assert planned([*busy, candidates[2]], wanted, policy=policy).decode.name == expected


# ---------------------------------------------------------------- conditional disaggregation


@pytest.mark.parametrize("name", POLICIES)
def test_short_rests_are_computed_where_they_are_decoded(name: str) -> None:
    policy = POLICIES[name](RouterConfig())
    candidates = pool(1, 1)
    rules = {"mode": "conditional", "max_tokens": 40, "saturated_tokens": 1000}

    def reason(hits: int, queued: int = 0) -> LocalReason | None:
        seen = [candidates[0], prefill("p0", queued)]
        return planned(seen, demand(160, [hits, 0]), policy=policy, **rules).local_reason  # type: ignore[arg-type]

    assert reason(8) is LocalReason.SHORT  # 32 tokens are left
    assert reason(7) is None  # 48 are
    assert reason(0, 1000) is LocalReason.SATURATED
    assert reason(0, 999) is None
    seen = [candidates[0], prefill("p0")]
    assert planned(seen, demand(160, [9, 0]), policy=policy).local_reason is None  # the configuration does not allow it


def test_local_prefill_competes_by_cost() -> None:
    """Where it is allowed and dear, a source computes the rest."""
    busy = decode("d0", {"p0": 1e9}, queued_tokens=50 * BLOCK)
    seen, wanted = [busy, prefill("p0")], demand(160, [9, 9])
    assert planned(seen, wanted, mode="conditional", max_tokens=40).prefill.name == "p0"
    idle = [decode("d0", {"p0": 1e9}), prefill("p0", 2 * BLOCK)]
    assert planned(idle, wanted, mode="conditional", max_tokens=40).local_reason is LocalReason.SHORT


def test_a_kept_pairing_follows_rates() -> None:
    candidates = pool(2, 2)
    pairing = Pairing(candidates)
    assert pairing.rates.readable.all()
    candidates[0] = decode("d0", {"p1": 5.0})
    pairing.read(candidates)
    assert pairing.rates.readable.tolist() == [[False, True], [True, True]]
    assert pairing.rates.s_per_byte[0].tolist() == [0, 0.2]


def test_a_choice_says_what_it_counts_on() -> None:
    plan = planned(pool(2, 2), demand(160, [4, 3, 2, 7]))
    assert isinstance(plan.choice, Choice) and names(plan) == ("d0", "p1")
    assert (plan.choice.num_decode_hits, plan.choice.num_prefill_hits, plan.choice.is_local) == (4, 7, False)
