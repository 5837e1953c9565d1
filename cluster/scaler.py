"""The autoscaler's memory: what each scaled pool should be now, for the controller that owns the pools."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.autoscaler import PoolLimits, PoolLoad, PoolState, Targets, need, resize
from cluster.config import Role, SluiceConfig
from cluster.log import Log
from cluster.metrics import Metrics
from cluster.reconcile import PoolSize


class Scaler:
    """Sizes survive another config, and in the number of standing workers also another controller."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._limits: dict[str, PoolLimits] = {}
        self._states: dict[str, PoolState] = {}
        self._targets = Targets(ttft_s=1, inter_token_s=1, utilization=1, up_after_s=1, down_after_s=1)

    @property
    def enabled(self) -> bool:
        return bool(self._limits)

    def configure(self, config: SluiceConfig, num_standing: Mapping[str, int]) -> None:
        """`num_standing`: workers that the pools have."""
        scaling = config.autoscaling
        self._targets = Targets(
            ttft_s=scaling.ttft_s,
            inter_token_s=scaling.inter_token_s,
            utilization=scaling.utilization,
            up_after_s=scaling.up_after_s,
            down_after_s=scaling.down_after_s,
        )
        self._limits = {
            name: PoolLimits(
                roles=frozenset(pool.roles),
                min_workers=pool.min_workers,
                max_workers=pool.max_workers,
                switches=scaling.switch_roles and {Role.PREFILL, Role.DECODE} == set(pool.roles),
            )
            for name, pool in config.pools.items()
            if scaling.enabled and pool.max_workers is not None
        }
        self._states = {
            name: self._states.get(name) or PoolState(size=num_standing.get(name) or config.pools[name].workers)
            for name in self._limits
        }
        self._states = resize(self._states, {}, self._limits, self._targets, 0.0)

    def sizes(self) -> dict[str, PoolSize]:
        """Of the pools that are scaled."""
        return {
            name: PoolSize(tuple(tuple(sorted(state.roles(i, self._limits[name]))) for i in range(state.size)))
            for name, state in self._states.items()
        }

    def step(self, loads: Mapping[str, PoolLoad], now: float, log: Log) -> None:
        """Once a second, with what the workers tell."""
        before, self._states = self._states, resize(self._states, loads, self._limits, self._targets, now)
        for name, load in loads.items():
            if name not in self._limits:
                continue
            asked = need(before[name], load, self._targets, now)
            self._metrics.needed_workers.labels(name, "prefill").set(asked.prefill)
            self._metrics.needed_workers.labels(name, "decode").set(asked.decode)
        for name, state in self._states.items():
            self._metrics.wanted_workers.labels(name).set(state.size)
            grown = state.size - before[name].size
            moved = state.prefill_places != before[name].prefill_places
            if grown or moved:
                direction = "up" if grown > 0 else "down" if grown else "roles"
                self._metrics.resizes.labels(name, direction).inc()
                log.info("resized", pool=name, num_workers=state.size, reason=direction)
