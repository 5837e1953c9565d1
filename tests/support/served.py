"""One cluster of plain processes, or another: what must be the same in all of them is asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from cluster.request import SamplingParams
from tests.support.plain_cluster import Answer, PlainCluster, running_cluster

PATIENT: Mapping[str, object] = {
    "words.heartbeat_timeout_s": 20.0,
    "words.step_timeout_s": 20.0,  # a busy machine is no failure here
    "log.level": "error",
}


class Served:
    def __init__(self, cluster: PlainCluster, runner: asyncio.Runner) -> None:
        self.cluster = cluster
        self.runner = runner

    def ask(self, texts: Sequence[list[int]], params: SamplingParams) -> list[Answer]:
        """All at once."""

        async def together() -> list[Answer]:
            return await asyncio.gather(*(self.cluster.ask(text, params) for text in texts))

        return self.runner.run(together())

    def total(self, metric: str, pool: str = "") -> float:
        return self.runner.run(self.cluster.total(metric, pool))


@contextmanager
def serving(
    settings: Mapping[str, object], /, *, prefill: int = 0, decode: int = 0, mixed: int = 0
) -> Iterator[Served]:
    """Aggregated where there are `mixed` workers; elsewhere no prompt is computed on a decode worker."""
    local = {"router.local_prefill": "always" if mixed else "never"}
    with running_cluster({**settings, **local}, prefill=prefill, decode=decode, mixed=mixed) as (cluster, runner):
        yield Served(cluster, runner)
