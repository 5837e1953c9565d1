from hypothesis import given
from hypothesis import strategies as st

from cluster.config import PoolConfig, Role
from cluster.placement import Bundle, place, rank_order, total


def pool(workers: int, cpus: float = 1.0, gpus: int = 0) -> PoolConfig:
    return PoolConfig(workers=workers, cpus=cpus, gpus=gpus, roles=(Role.DECODE,))


def test_one_group_per_worker() -> None:
    placements = place({"prefill": pool(2), "decode": pool(1, cpus=2)})
    assert [(p.name, p.pool, p.index, p.bundles) for p in placements] == [
        ("decode-0", "decode", 0, (Bundle(2.0),)),
        ("prefill-0", "prefill", 0, (Bundle(1.0),)),
        ("prefill-1", "prefill", 1, (Bundle(1.0),)),
    ]


def test_one_bundle_per_gpu() -> None:
    (placement,) = place({"decode": pool(1, cpus=8, gpus=4)})
    assert placement.bundles == (Bundle(cpus=2.0, gpus=1.0),) * 4
    assert placement.bundles[0].resources() == {"CPU": 2.0, "GPU": 1.0}


def test_a_bundle_is_never_empty() -> None:
    (placement,) = place({"decode": pool(1, cpus=0)})
    assert placement.bundles[0].resources() == {"CPU": 0.001}


def test_an_empty_pool_asks_for_nothing() -> None:
    assert place({"decode": pool(0)}) == ()
    assert total(()) == Bundle(0.0)


@given(
    st.dictionaries(st.sampled_from("abc"), st.builds(pool, st.integers(0, 4), st.integers(0, 8), st.integers(0, 4)))
)
def test_names_are_unique_and_nothing_is_lost(pools: dict[str, PoolConfig]) -> None:
    placements = place(pools)
    assert len({p.name for p in placements}) == len(placements) == sum(p.workers for p in pools.values())
    assert abs(total(placements).cpus - sum(p.workers * p.cpus for p in pools.values())) < 1e-6
    assert total(placements).gpus == sum(p.workers * p.gpus for p in pools.values())


@given(st.lists(st.sampled_from(["x", "y", "z"]), max_size=8))
def test_ranks_of_a_node_are_neighbours(nodes: list[str]) -> None:
    order = rank_order(nodes)
    assert sorted(order) == list(range(len(nodes)))
    in_order = [nodes[i] for i in order]
    assert len([n for i, n in enumerate(in_order) if i == 0 or in_order[i - 1] != n]) == len(set(nodes))
