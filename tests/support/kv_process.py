"""A process of its own with one rank over NIXL, driven through a pipe. The parent never makes an agent itself:
what an agent does to its process (threads, exit) is among the things tested."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TypeVar

from cluster.errors import TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, Connected, Done, Executor, Pull, ReadLimits
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from kvtransfer.transport import TransportKind
from tests.support.kv_builders import sharded_block

DEADLINE_S = 60.0
Answer = TypeVar("Answer")


class RankProcess:
    """Parent's handle. `limits` are those of the executor; `ucx_tls` as in the config."""

    def __init__(
        self,
        name: str,
        geometry: KvGeometry,
        num_blocks: int,
        *,
        ucx_tls: str = "auto",
        limits: ReadLimits | None = None,
        device: str = "cpu",
        transport: TransportKind = "nixl",
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, name, geometry, num_blocks, ucx_tls, limits or ReadLimits(30.0, 60.0), device, transport)
        self.process: BaseProcess = context.Process(target=_main, args=arguments, name=name, daemon=True)
        self.process.start()
        theirs.close()
        self.offer = pb.TransportOffer(transport="nixl")

    def __enter__(self) -> RankProcess:
        """Waits until it is up; make several before entering any, and they start side by side."""
        self.offer.ranks.append(pb.RankOffer.FromString(self._receive(bytes)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(DEADLINE_S)

    def write(self, blocks: list[int], contents: list[int], generation: int) -> None:
        """Raises the generations, then writes; every region of group 0."""
        self.pipe.send(("write", blocks, contents, generation))
        self._receive(str)

    def read(self, blocks: list[int], contents: list[int]) -> list[bool]:
        """Which blocks have exactly the bytes of these contents."""
        self.pipe.send(("compare", blocks, contents))
        return self._receive(list)

    def connect(self, source: RankProcess) -> Connected:
        self.pipe.send(("connect", source.name, source.offer.SerializeToString()))
        return self._receive(Connected)

    def disconnect(self, source: RankProcess) -> None:
        self.pipe.send(("disconnect", source.name))

    def submit(
        self, source: RankProcess, blocks: list[int], into: list[int], generations: list[int], id: int = 1
    ) -> None:
        pairs = tuple(BlockPair(0, a, b) for a, b in zip(blocks, into, strict=True))
        self.pipe.send(("pull", Pull(id, source.name, pairs, tuple(generations))))

    def done(self) -> Done:
        return self._receive(Done)

    def pull(self, source: RankProcess, blocks: list[int], into: list[int], generations: list[int]) -> Done:
        self.submit(source, blocks, into, generations)
        return self.done()

    def idle_cores(self, seconds: float) -> float:
        """Cores that the process keeps busy while nothing happens."""
        self.pipe.send(("idle", seconds))
        return self._receive(float)

    def stop(self) -> int | None:
        """Ends it as a worker ends; returns the exit code."""
        self.pipe.send(("stop",))
        self.process.join(DEADLINE_S)
        return self.process.exitcode

    def _receive(self, kind: type[Answer]) -> Answer:
        if not self.pipe.poll(DEADLINE_S):
            raise TimeoutError(f"{self.name} has not answered within {DEADLINE_S} s")
        answer = self.pipe.recv()
        assert isinstance(answer, kind), answer
        return answer


def _main(
    pipe: Connection,
    name: str,
    geometry: KvGeometry,
    num_blocks: int,
    ucx_tls: str,
    limits: ReadLimits,
    device: str,
    transport: TransportKind,
) -> None:
    import torch

    from kvtransfer.nixl_transport import prepare_environment
    from kvtransfer.transports import open_transport

    prepare_environment(ucx_tls)
    sending = threading.Lock()

    def send(answer: object) -> None:
        if isinstance(answer, Connected) and answer.error is not None:  # causes of library types do not travel
            error = TransferError(str(answer.error))
            answer = Connected(answer.peer, answer.rank, answer.transport, answer.bytes_per_s, error)
        with sending:
            pipe.send(answer)

    pool = KvPool.allocate(geometry, RankLayout(0), [num_blocks], device)

    def synchronize() -> None:
        if pool.device.type == "cuda":
            torch.cuda.synchronize(pool.device)

    synchronize()
    executor = Executor(pool, open_transport(transport, f"{name}/0", pool.device), limits, send)
    executor.start()
    send(executor.offer().SerializeToString())
    regions = list(zip(geometry.groups[0].regions, pool.regions[0], strict=True))

    def write(blocks: list[int], contents: list[int], generation: int) -> None:
        pool.generations[0].raise_to(blocks, [generation] * len(blocks))
        for spec, storage in regions:
            for block, content in zip(blocks, contents, strict=True):
                storage[block] = torch.from_numpy(sharded_block(spec, content, 0, 1)).view_as(storage[block])
        synchronize()
        send("written")

    def compare(blocks: list[int], contents: list[int]) -> None:
        send(
            [
                all(
                    (storage[block].cpu().numpy() == sharded_block(spec, content, 0, 1)).all()
                    for spec, storage in regions
                )
                for block, content in zip(blocks, contents, strict=True)
            ]
        )

    def idle(seconds: float) -> None:
        started, used = time.perf_counter(), time.process_time()
        pipe.poll(seconds)  # nothing comes
        send((time.process_time() - used) / (time.perf_counter() - started))

    commands: dict[str, Callable[..., None]] = {
        "write": write,
        "compare": compare,
        "idle": idle,
        "connect": lambda peer, offer: executor.connect(peer, pb.TransportOffer.FromString(offer), send),
        "disconnect": executor.disconnect,
        "pull": executor.submit,
    }
    while True:
        word, *arguments = pipe.recv()
        if word == "stop":
            break
        commands[word](*arguments)
    executor.stop()
