"""Pools -> placement groups, as plain values. `pool.py` hands them to Ray.

One worker is one placement group with one bundle per rank: the group is the unit of placement and restart, so
a pool grows and shrinks by whole groups and a dead worker's place is freed at once. Ranks of a worker are
packed on one host where they fit; Ray may spread them, and does not keep bundles in the order of ranks on the
hosts it chose: `rank_order` puts them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import PoolConfig


@dataclass(frozen=True, slots=True)
class Bundle:
    """Resources of one rank."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: int = 0

    def resources(self) -> dict[str, float]:
        """In Ray's names; a bundle must not be empty, so a worker without cores asks for a sliver."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    """Where one worker goes: `name` is stable over restarts ("prefill-0"), one bundle per rank."""

    name: str
    pool: str
    index: int
    bundles: tuple[Bundle, ...]
    strategy: str = "PACK"


def worker_name(pool: str, index: int) -> str:
    return f"{pool}-{index}"


def place(pools: Mapping[str, PoolConfig]) -> tuple[WorkerPlacement, ...]:
    """Every worker of every pool, pools in order of their names. One rank per GPU, and one rank without any."""
    return tuple(place_one(name, pool, index) for name, pool in sorted(pools.items()) for index in range(pool.workers))


def place_one(name: str, pool: PoolConfig, index: int) -> WorkerPlacement:
    """The worker in place `index` of a pool, which may have grown past `pool.workers`."""
    return WorkerPlacement(worker_name(name, index), name, index, _bundles(pool))


def at_most(pools: Mapping[str, PoolConfig]) -> dict[str, PoolConfig]:
    """As large as autoscaling may make them."""
    return {
        name: pool.model_copy(update={"workers": max(pool.workers, pool.max_workers or 0)})
        for name, pool in pools.items()
    }


def total(placements: Sequence[WorkerPlacement]) -> Bundle:
    """What all of them ask for together: for `check-config` and for a message when it does not fit."""
    bundles = [bundle for placement in placements for bundle in placement.bundles]
    return Bundle(
        cpus=sum(bundle.cpus for bundle in bundles),
        gpus=sum(bundle.gpus for bundle in bundles),
        memory_bytes=sum(bundle.memory_bytes for bundle in bundles),
    )


def rank_order(bundle_nodes: Sequence[str]) -> tuple[int, ...]:
    """Bundle indices in the order of ranks, such that ranks on one node are neighbours.

    `bundle_nodes[i]` is the node of bundle i. Nodes keep the order of their first bundle.
    """
    first = {node: bundle_nodes.index(node) for node in set(bundle_nodes)}
    return tuple(sorted(range(len(bundle_nodes)), key=lambda i: (first[bundle_nodes[i]], i)))


def _bundles(pool: PoolConfig) -> tuple[Bundle, ...]:
    num_ranks = max(1, int(pool.gpus))
    return (Bundle(cpus=pool.cpus / num_ranks, gpus=pool.gpus / num_ranks),) * num_ranks
