"""The parts of a worker in this process: neither sessions nor any thread beside the engine's."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from cluster.config import SluiceConfig

if TYPE_CHECKING:
    from workers.assembly import Assembly


def lone_engine(config: SluiceConfig, pool: str) -> Assembly:
    """An engine as the workers of `pool` have it, for a process of its own."""
    from kvtransfer import nixl_transport
    from workers.assembly import WorkerSettings, assemble

    nixl_transport.prepare_environment()
    settings = WorkerSettings(
        name="alone",
        incarnation=uuid4().hex,
        pool=pool,
        resources=config.pools[pool],
        model=config.model,
        engine=config.engine,
        kv=config.kv,
        scheduler=config.scheduler,
        transfer=config.transfer,
        words=config.words,
        secret=b"benchmark",
    )
    return assemble(settings, lambda done: None)
