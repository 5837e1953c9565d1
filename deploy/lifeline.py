"""An ingress replica's tie to the controller: keeps the lease renewed and follows the membership.

The controller may die and come back, or be gone and have to be made anew; meanwhile the last known membership
stands, and the workers and their streams know nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from cluster.config import SluiceConfig
from cluster.controller import Renewal, connect
from cluster.exporter import Export
from cluster.log import Log
from cluster.membership import Membership

_RENEW_S = 2.0  # at most; and soon after a controller was lost, since its successor has no config
_WATCH_S = 10.0
_PAUSE_S = 0.2
_ANSWER_S = 5.0


class Lifeline:
    """`on_members(membership, num_ingresses)` is called in the event loop of `start`, when either changes.

    `export`: where this ingress exports its metrics. `exports`: all that the controller knew of at the last renewal,
    those of workers not among them.
    """

    def __init__(
        self,
        config: SluiceConfig,
        revision: int,
        ingress_id: str,
        worker_class: type,
        on_members: Callable[[Membership, int], None],
        log: Log,
        export: Export | None = None,
    ) -> None:
        self.num_ingresses = 1
        self.exports: tuple[Export, ...] = ()
        self.renewed_at: float | None = None  # monotonic; none: never
        self._config = config
        self._wire = config.model_dump_json()
        self._revision = revision
        self._ingress_id = ingress_id
        self._worker_class = worker_class
        self._on_members = on_members
        self._log = log
        self._export = export
        self._membership = Membership(version=-1)
        self._controller: Any = None
        self._lost = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Says goodbye; the lease itself runs on for a successor."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._controller is not None:
            try:
                await self._call(1.0, "leave", self._ingress_id)
            except (RayError, TimeoutError):
                pass

    async def _renew(self) -> None:
        pause_s = min(_RENEW_S, self._config.controller.ingress_lease_s / 4)
        while True:
            self._lost.clear()
            try:
                self._controller = await asyncio.to_thread(connect, self._config.name, self._worker_class)
                renewal: Renewal = await self._call(
                    _ANSWER_S, "renew", self._ingress_id, self._revision, self._wire, self._export
                )
            except (RayError, ValueError, TimeoutError) as error:
                self._log.warning("no controller", error=type(error).__name__)
                await asyncio.sleep(_PAUSE_S)
                continue
            if renewal.removing:  # it was about to end: the next one will be ours
                await asyncio.sleep(_PAUSE_S)
                continue
            self.renewed_at = time.monotonic()
            self.exports = renewal.exports
            if self.num_ingresses != max(1, renewal.num_ingresses):
                self.num_ingresses = max(1, renewal.num_ingresses)
                self._on_members(self._membership, self.num_ingresses)
            try:
                async with asyncio.timeout(pause_s):
                    await self._lost.wait()
            except TimeoutError:
                pass

    async def _watch(self) -> None:
        while True:
            if self.renewed_at is None:
                await asyncio.sleep(0.01)
                continue
            try:
                wire: bytes = await self._call(
                    _WATCH_S + _ANSWER_S, "watch", self._ingress_id, self._membership.version, _WATCH_S
                )
            except (RayError, TimeoutError):
                self._lost.set()
                await asyncio.sleep(_PAUSE_S)
                continue
            membership = Membership.from_wire(wire)
            if membership.version != self._membership.version:
                self._membership = membership
                self._on_members(membership, self.num_ingresses)

    async def _call(self, timeout_s: float, method: str, *args: object) -> Any:
        async with asyncio.timeout(timeout_s):
            return await getattr(self._controller, method).remote(*args)
