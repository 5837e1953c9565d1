"""What the transport really moves between two processes of this machine, or two of its GPUs, measured through the
connector."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from cluster.config import TransferConfig
from cluster.errors import TransferError
from cluster.protos import worker_pb2 as pb
from kvtransfer.connector import BlockPair, Connected, Done, Executor, Outcome, Pull, ReadLimits
from kvtransfer.layout import GroupSpec, KvGeometry, PageFormat, RankLayout, RegionSpec
from kvtransfer.pool import KvPool

_LATENT_ROWS = RegionSpec(
    name="latents", num_layers=61, page_format=PageFormat.ROWS, dtype="bfloat16", block_size=64, row_size=576
)
GEOMETRY = KvGeometry((GroupSpec("self", 64, (_LATENT_ROWS,)),), rope_convention="probe")  # one shard of DeepSeek-V3
NUM_BLOCKS = 16
_ROUNDS = 5
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Best of several pulls of the same blocks, and a copy of the same bytes inside one process. `others`: bytes/s by
    what was not chosen, as it was when the two met."""

    transport: str
    num_bytes: int
    bytes_per_s: float
    memcpy_bytes_per_s: float
    others: Mapping[str, float]


def measure(config: TransferConfig, source: str = "cpu", sink: str = "cpu") -> Rate:
    """From device `source` to device `sink`. Takes some seconds and two processes, which end with it. Raises
    TransferError with the reason."""
    context = multiprocessing.get_context("spawn")  # an agent leaves marks on its process: not on ours
    source_end, source_pipe = context.Pipe()
    sink_end, sink_pipe = context.Pipe()
    processes = [
        context.Process(target=_source, args=(source_pipe, config, source), daemon=True),
        context.Process(target=_sink, args=(sink_pipe, config, sink), daemon=True),
    ]
    for process in processes:
        process.start()
    source_pipe.close()
    sink_pipe.close()
    try:
        sink_end.send(_receive(source_end))
        rate = _receive(sink_end)
    finally:
        source_end.close()
        sink_end.close()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    if isinstance(rate, str):
        raise TransferError(rate)
    assert isinstance(rate, Rate)
    return rate


def _receive(pipe: Connection) -> object:
    if not pipe.poll(_PATIENCE_S):
        raise TransferError(f"no answer from the other process for {_PATIENCE_S:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise TransferError("the other process died; see what it wrote above") from None


def _executor(
    name: str, config: TransferConfig, device: str, answers: SimpleQueue[Done | Connected]
) -> tuple[Executor, KvPool]:
    from kvtransfer.nixl_transport import prepare_environment
    from kvtransfer.transports import open_transport

    prepare_environment(config.ucx_tls)
    pool = KvPool.allocate(GEOMETRY, RankLayout(0), [NUM_BLOCKS], device)
    for storage in pool.regions[0]:
        storage.fill_(1)
    _settle(pool)
    limits = ReadLimits(config.late_read_s, config.stuck_read_s)
    transport = open_transport("nixl" if device == "cpu" else config.transport, name, pool.device)
    executor = Executor(pool, transport, limits, answers.put)
    executor.start()
    return executor, pool


def _settle(pool: KvPool) -> None:
    if pool.device.type == "cuda":
        torch.cuda.synchronize(pool.device)


def _source(pipe: Connection, config: TransferConfig, device: str) -> None:
    executor, _ = _executor("probe-source", config, device, SimpleQueue())
    offer = pb.TransportOffer(transport=executor.transport_name, ranks=[executor.offer()])
    pipe.send(offer.SerializeToString())
    try:
        pipe.recv()  # until the parent closes its end
    except EOFError:
        executor.stop()


def _sink(pipe: Connection, config: TransferConfig, device: str) -> None:
    answers: SimpleQueue[Done | Connected] = SimpleQueue()
    executor, pool = _executor("probe-sink", config, device, answers)
    try:
        offer = pb.TransportOffer.FromString(pipe.recv())
    except EOFError:
        executor.stop()
        return
    executor.connect("probe-source", offer, answers.put)
    connected = answers.get(timeout=_PATIENCE_S)
    if isinstance(connected, Connected) and connected.error is None:
        others = {way: rate for way, rate in connected.rates.items() if way != connected.transport}
        pipe.send(_pull(executor, pool, answers, others))
    else:
        pipe.send(f"no connection: {connected}")
    executor.stop()


def _pull(
    executor: Executor, pool: KvPool, answers: SimpleQueue[Done | Connected], others: Mapping[str, float]
) -> Rate | str:
    blocks = range(1, NUM_BLOCKS + 1)
    pairs = tuple(BlockPair(0, block, block) for block in blocks)
    best_s, best_copy_s, num_bytes, transport = float("inf"), float("inf"), 0, ""
    for number in range(_ROUNDS):
        executor.submit(Pull(number, "probe-source", pairs, (0,) * NUM_BLOCKS))
        done = answers.get(timeout=_PATIENCE_S)
        if not isinstance(done, Done) or done.outcome is not Outcome.OK:
            return f"a pull failed: {done}"
        best_s, num_bytes, transport = min(best_s, done.seconds), done.num_bytes, done.transport
        storage = pool.regions[0][0]
        target = storage.clone()
        _settle(pool)
        started = time.perf_counter()
        target.copy_(storage)
        _settle(pool)
        best_copy_s = min(best_copy_s, time.perf_counter() - started)
    copy_bytes = pool.regions[0][0].numel()
    return Rate(transport, num_bytes, num_bytes / best_s, copy_bytes / best_copy_s, others)
