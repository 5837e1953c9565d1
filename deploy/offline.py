"""A whole deployment for one job: worker processes, and in this process the router with the API behind it.

No Ray and no HTTP: it starts in the time that the workers need to load the model.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

from cluster.config import Role, SluiceConfig
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from deploy.api_service import ApiService
from deploy.served_model import ServedModel
from deploy.tokenizer import Tokenizer
from deploy.worker_processes import WorkerProcesses
from router.router import Router

Work = Callable[[ApiService], Awaitable[None]]
Progress = Callable[[str], None]

_LOOK_S = 0.02
_KV_BYTES = 512 << 20  # per worker: more takes seconds to allocate


def for_one_job(config: SluiceConfig) -> SluiceConfig:
    """With KV pools that are there at once, where the config does not size them."""
    if {"num_blocks", "memory_bytes", "memory_fraction"} & config.kv.model_fields_set:
        return config
    return config.model_copy(update={"kv": config.kv.model_copy(update={"memory_bytes": _KV_BYTES})})


async def run(config: SluiceConfig, directory: Path, work: Work, progress: Progress, *, with_tokenizer: bool) -> None:
    """Awaits `work` once every worker serves; afterwards, or when cancelled, nothing is left running.

    Logs go to `directory`/log. Raises CheckpointError, and SluiceError when a worker cannot be kept alive.
    """
    model = ServedModel.read(config)  # what fails at once should fail before anything starts
    secret = secrets.token_hex(32)
    metrics, log = Metrics(), Log.open("offline", config.log)
    words = WordsThread(config=config.words).start()
    identity = pb.Identity(kind=pb.INGRESS, name="offline", incarnation=uuid4().hex)
    router = Router(
        config.router,
        config.limits,
        words,
        identity,
        secret.encode(),
        metrics,
        log,
        block_size=config.kv.block_size,
    )
    await router.start()
    fleet = Fleet(config, router)
    processes = WorkerProcesses(config, directory, secret, fleet.update)

    async def ready_then_work() -> None:
        progress(fleet.waiting() or "")
        tokenizer = await asyncio.to_thread(Tokenizer.load, config.model.path) if with_tokenizer else None
        while (waiting := fleet.waiting()) is not None:
            progress(waiting)
            await asyncio.sleep(_LOOK_S)
        service = ApiService(
            router=router,
            tokenizer=tokenizer,
            model=model,
            http=config.http,
            limits=config.limits,
            metrics=metrics,
            log=log,
        )
        await work(service)

    living, working = asyncio.create_task(processes.run()), asyncio.create_task(ready_then_work())
    try:
        await asyncio.wait((living, working), return_when=asyncio.FIRST_COMPLETED)
        for task in (living, working):
            if task.done():
                task.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await router.stop()
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
        await asyncio.to_thread(words.stop)


class Fleet:
    """What the job waits for before its first request."""

    def __init__(self, config: SluiceConfig, router: Router) -> None:
        self._num_workers = sum(pool.workers for pool in config.pools.values())
        self._router = router
        self._num_serving = 0

    def update(self, membership: Membership) -> None:
        self._num_serving = len(membership.members)
        self._router.update_membership(membership)

    def waiting(self) -> str | None:
        """For people; None when the first request would run."""
        if self._num_serving < self._num_workers:
            return f"loading the model: {self._num_serving} of {self._num_workers} workers serve"
        return None if self._router.ready() else f"connecting the workers: {self._router.why_not_ready()}"


def max_open(config: SluiceConfig) -> int:
    """Requests that keep all workers busy and fit into their queues."""
    pools = config.pools.values()
    num_sinks, num_sources = (
        sum(pool.workers for pool in pools if role in pool.roles) for role in (Role.DECODE, Role.PREFILL)
    )
    scheduler = config.scheduler
    room = min(num_sinks * scheduler.max_sequences * 2, max(1, num_sources) * scheduler.max_waiting)
    return min(room, config.limits.max_requests)
