"""An ingress of its own process: a router and its clients, to be killed or stopped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from uuid import uuid4

from cluster.config import SluiceConfig
from cluster.errors import RequestError
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from cluster.words_thread import WordsThread
from router.flight import RouterRequest
from router.router import Router
from tests.support.plain_cluster import FORKS, SECRET, PlainCluster

FAILED = -1
Told = tuple[int, int, tuple[int, ...]]  # index of the text, index of the first of the tokens or FAILED, tokens


async def _serve(
    config: SluiceConfig,
    membership: Membership,
    texts: Sequence[tuple[int, ...]],
    max_tokens: Sequence[int],
    id_bytes: int,
    pipe: Connection,
) -> None:
    words = WordsThread(config=config.words).start()
    identity = pb.Identity(kind=pb.INGRESS, name="other-ingress", incarnation=uuid4().hex)
    log = Log.open("router", config.log)
    router = Router(
        config.router, config.limits, words, identity, SECRET, Metrics(), log, block_size=config.kv.block_size
    )
    await router.start()
    router.update_membership(membership)
    while not router.ready():
        await asyncio.sleep(0.01)

    async def client(index: int, text: tuple[int, ...]) -> None:
        sampling = SamplingParams(max_tokens=max_tokens[index], ignore_eos=True)
        request = RouterRequest(request_id=uuid4().hex.ljust(id_bytes, "x"), prompt_token_ids=text, sampling=sampling)
        try:
            async for delta in router.generate(request):
                pipe.send((index, delta.first_index, delta.token_ids))
        except RequestError:
            pipe.send((index, FAILED, ()))

    await asyncio.gather(*(client(index, text) for index, text in enumerate(texts)))
    pipe.send(None)
    await router.stop()
    words.stop()


def _main(
    config: SluiceConfig,
    wire: bytes,
    texts: list[tuple[int, ...]],
    max_tokens: list[int],
    id_bytes: int,
    pipe: Connection,
) -> None:
    asyncio.run(_serve(config, Membership.from_wire(wire), texts, max_tokens, id_bytes, pipe))


@dataclass(slots=True)
class IngressProcess:
    process: ForkServerProcess
    pipe: Connection

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    async def told(self) -> Told | None:
        """The next tokens of any of its clients; None when all have everything."""
        return await asyncio.to_thread(self.pipe.recv)

    async def rest(self, told: dict[int, list[int]]) -> dict[int, list[int]]:
        """Everything until all clients have everything, by text."""
        while (news := await self.told()) is not None:
            index, first, tokens = news
            text = told.setdefault(index, [])
            assert first == len(text), "a token was lost or doubled"
            text += tokens
        return told


@asynccontextmanager
async def ingress_process(
    cluster: PlainCluster, texts: Sequence[tuple[int, ...]], max_tokens: int | Sequence[int], *, id_bytes: int = 32
) -> AsyncIterator[IngressProcess]:
    """Asks for all texts at once, as soon as its router is ready. `max_tokens` of all texts, or of each.

    Every token of a request travels with its id: long ids make many bytes of few tokens.
    """
    ours, theirs = FORKS.Pipe()
    members = tuple(worker.member for worker in cluster.workers.values() if worker.member)
    wire = Membership(1, members).to_wire()
    limits = [max_tokens] * len(texts) if isinstance(max_tokens, int) else list(max_tokens)
    process = FORKS.Process(
        target=_main, args=(cluster.config, wire, list(texts), limits, id_bytes, theirs), daemon=True
    )
    await asyncio.to_thread(process.start)
    theirs.close()
    try:
        yield IngressProcess(process, ours)
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
        ours.close()
