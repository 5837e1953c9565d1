"""An ingress of its own process: a router, the clients that ask it, and a pipe on which all is told as it happens.

The parent says `pace` (how many clients ask), `storm` (so many at once), and who is a member. What the clients get is
written down at the parent's end of the pipe: a killed ingress takes none of it along.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from random import Random
from typing import NamedTuple
from uuid import uuid4

from cluster.config import SluiceConfig
from cluster.errors import Busy, RequestError, SessionError
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from cluster.session import Session
from cluster.words_thread import WordsThread
from router.flight import RouterRequest
from router.router import Router
from tests.chaos.questions import Question
from tests.chaos.record import Asked, Ended, Got, Line, Notice, Outcome
from tests.support.plain_cluster import FORKS, SECRET

CANCELS = 0.1  # of the requests: their clients go away; unless another share is asked for
RETRY_S = 0.2  # after a refusal, as Retry-After asks for


class Members(NamedTuple):
    wire: bytes


class Pace(NamedTuple):
    num_clients: int


class Storm(NamedTuple):
    num_requests: int


class Ready(NamedTuple):
    incarnation: str


Command = Members | Pace | Storm


class Crowd:
    """In the ingress's process, on its event loop."""

    def __init__(
        self,
        router: Router,
        incarnation: str,
        asked: list[Question],
        seed: int,
        cancels: float,
        tell: Callable[[Line], None],
    ) -> None:
        self._router = router
        self._incarnation = incarnation
        self._asked = asked
        self._random = Random(seed)
        self._cancels = cancels
        self._tell = tell
        self._num_clients = 0
        self._clients: set[asyncio.Task[None]] = set()
        self._storms: set[asyncio.Task[bool]] = set()

    def pace(self, num_clients: int) -> None:
        """So many ask one question after the other; those that are too many end their last one."""
        self._num_clients = num_clients
        for number in range(len(self._clients), num_clients):
            task = asyncio.ensure_future(self._client(number))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)

    def storm(self, num_requests: int) -> None:
        for _ in range(num_requests):
            task = asyncio.ensure_future(self._question(storm=True))
            self._storms.add(task)
            task.add_done_callback(self._storms.discard)

    async def _client(self, number: int) -> None:
        while number < self._num_clients:
            if not await self._question(storm=False):
                await asyncio.sleep(RETRY_S)

    async def _question(self, *, storm: bool) -> bool:
        """All samples of one question, as the API asks for them. Whether none was refused."""
        question = self._random.choice(self._asked)
        leader = uuid4().hex
        cancels = not storm and self._random.random() < self._cancels
        cancel_after = self._random.randrange(question.samplings[0].max_tokens) if cancels else None
        ids = [leader, *(uuid4().hex for _ in question.samplings[1:])]
        sent = [
            self._request(request_id, leader if request_id != leader else "", question, sampling, cancel_after, storm)
            for request_id, sampling in zip(ids, question.samplings, strict=True)
        ]
        return all(await asyncio.gather(*sent))

    async def _request(
        self,
        request_id: str,
        leader_id: str,
        question: Question,
        sampling: SamplingParams,
        cancel_after: int | None,
        storm: bool,
    ) -> bool:
        self._tell(
            Asked(
                at_s=time.monotonic(),
                request=request_id,
                question=question.number,
                sample=sampling.sample,
                ingress=self._incarnation,
                storm=storm,
                cancel_after=cancel_after,
            )
        )
        request = RouterRequest(
            request_id=request_id, prompt_token_ids=question.prompt, sampling=sampling, leader_id=leader_id
        )
        outcome: Outcome = "ok"
        told = ""
        try:
            if cancel_after is None:
                await self._read(request)
            elif cancel_after == 0:  # gone before its first token, or with it
                outcome = "cancelled"
                reading = asyncio.ensure_future(self._read(request))
                await asyncio.wait((reading,), timeout=self._random.uniform(0, 0.2))
                reading.cancel()
                [result] = await asyncio.gather(reading, return_exceptions=True)
                if isinstance(result, RequestError):
                    raise result
            elif await self._read(request, cancel_after):
                outcome = "cancelled"
        except Busy as error:
            outcome, told = "refused", str(error)
        except RequestError as error:
            outcome, told = "failed", f"{type(error).__name__}: {error}"
        route = self._router.route(request_id)
        attempts = route.attempts if route else ()
        self._tell(
            Ended(
                at_s=time.monotonic(),
                request=request_id,
                outcome=outcome,
                error=told,
                num_attempts=len(attempts),
                workers=tuple(dict.fromkeys(name for each in attempts for name in (each.decode, each.prefill))),
            )
        )
        return outcome != "refused"

    async def _read(self, request: RouterRequest, most: int | None = None) -> bool:
        """Whether the client left when it had `most` tokens."""
        num_tokens = 0
        async with aclosing(self._router.generate(request)) as deltas:
            async for delta in deltas:
                self._tell(
                    Got(
                        at_s=time.monotonic(),
                        request=request.request_id,
                        first_index=delta.first_index,
                        tokens=delta.token_ids,
                    )
                )
                num_tokens += len(delta.token_ids)
                if most is not None and num_tokens >= most and delta.finish is None:
                    return True
        return False


async def _serve(
    config: SluiceConfig, name: str, asked: list[Question], seed: int, cancels: float, pipe: Connection
) -> None:
    loop = asyncio.get_running_loop()
    words = WordsThread(config=config.words).start()
    incarnation = uuid4().hex
    identity = pb.Identity(kind=pb.INGRESS, name=name, incarnation=incarnation)
    log = Log.open("router", config.log)
    router = Router(
        config.router, config.limits, words, identity, SECRET, Metrics(), log, block_size=config.kv.block_size
    )
    heard = router.on_broken

    def acted(peer: str, reason: str) -> None:
        pipe.send(Notice(at_s=time.monotonic(), peer=peer, by=name, reason=reason))

    def on_broken(session: Session, error: SessionError) -> None:
        heard(session, error)
        loop.call_soon_threadsafe(acted, session.peer.incarnation, str(error))

    router.on_broken = on_broken
    await router.start()
    router.update_membership(Membership.from_wire(pipe.recv().wire))
    while not router.ready():
        await asyncio.sleep(0.01)
    crowd = Crowd(router, incarnation, asked, seed, cancels, pipe.send)
    ended = asyncio.Event()

    def obey(command: Command) -> None:
        match command:
            case Members(wire):
                router.update_membership(Membership.from_wire(wire))
            case Pace(num_clients):
                crowd.pace(num_clients)
            case Storm(num_requests):
                crowd.storm(num_requests)

    def listen() -> None:
        try:
            while True:
                loop.call_soon_threadsafe(obey, pipe.recv())
        except (EOFError, OSError):
            loop.call_soon_threadsafe(ended.set)

    pipe.send(Ready(incarnation))
    threading.Thread(target=listen, name="crowd-commands", daemon=True).start()
    await ended.wait()
    await router.stop()
    words.stop()


def _main(config: SluiceConfig, name: str, asked: list[Question], seed: int, cancels: float, pipe: Connection) -> None:
    asyncio.run(_serve(config, name, asked, seed, cancels, pipe))


class CrowdProcess:
    """The parent's handle; `hear` is called on a thread of its own with each line."""

    def __init__(
        self,
        config: SluiceConfig,
        name: str,
        asked: list[Question],
        seed: int,
        hear: Callable[[Line], None],
        *,
        cancels: float = CANCELS,
    ) -> None:
        self.name = name
        self.incarnation = ""
        self._hear = hear
        self._pipe, theirs = FORKS.Pipe()
        self.process: ForkServerProcess = FORKS.Process(
            target=_main, args=(config, name, asked, seed, cancels, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def start(self, wire: bytes) -> None:
        """Returns when its router is ready."""
        self.send(Members(wire))
        told = self._pipe.recv()
        while not isinstance(told, Ready):
            self._hear(told)
            told = self._pipe.recv()
        self.incarnation = told.incarnation
        self._reader = threading.Thread(target=self._read, name=f"{self.name}-told", daemon=True)
        self._reader.start()

    def send(self, command: Command) -> None:
        try:
            self._pipe.send(command)
        except OSError:
            return  # killed

    def join(self) -> None:
        """After its death: all that it told has been heard."""
        self.process.join()
        self._reader.join()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def _read(self) -> None:
        try:
            while True:
                self._hear(self._pipe.recv())
        except (EOFError, OSError):
            return
