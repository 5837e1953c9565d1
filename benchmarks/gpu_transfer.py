"""Pieces of device memory between two processes, each with a GPU of its own, against a plain copy between the two.

    python -m benchmarks.gpu_transfer [--repeats 20] [--sweep] [--json FILE]

    device     time of the kernel alone on the reading GPU, by its own clock
    wall       from Transport.read to COMPLETE, polled without pause: what a pull pays before its generation check

Pieces lie at random places of a buffer of 4 GB, other ones each time, so that no cache holds them; what arrives is
compared. 73,728 bytes is a layer of a block of 64 tokens of DeepSeek-V3's latents, 4,497,408 the block. The bound is
one cudaMemcpy of 1 GB between the devices. With one GPU both processes share it, and the figures say so. --sweep
tries the kernel's tactics instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.process import process, receive
from benchmarks.report import Figure, Report, Setting, progress, publish
from kvtransfer import device_memory, nixl_transport
from kvtransfer.gather import BEST, Gather, Tactic
from kvtransfer.transport import AgentOffer, MemorySpan, ReadState, Transport, TransportKind
from kvtransfer.transports import open_transport

BUFFER_BYTES = 4 << 30
LAYER, BLOCK = 73_728, 61 * 73_728
PATTERN = 251  # bytes repeat after so many, which divides no power of two


class Pieces(NamedTuple):
    number: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.number} × {self.num_bytes / 1e3:,.0f} kB"

    @property
    def total(self) -> int:
        return self.number * self.num_bytes


CASES = (Pieces(64, LAYER), Pieces(1024, LAYER), Pieces(64, 2 << 20), Pieces(64, BLOCK))
TARGETS_GB_S = {Pieces(1024, LAYER): 350.0, Pieces(64, BLOCK): 350.0}


@dataclass(frozen=True, slots=True)
class Offered:
    """What the source has."""

    agent: AgentOffer
    address: int
    memory: device_memory.Exported


def _buffer(device: torch.device) -> torch.Tensor:
    return torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device=device)


def _transport(kind: TransportKind, name: str, buffer: torch.Tensor) -> Transport:
    transport = open_transport(kind, name, buffer.device)
    transport.register(MemorySpan(buffer.data_ptr(), buffer.numel(), (buffer.device.index or 0) + 1))
    return transport


def source(pipe: Connection, kind: TransportKind, device: str) -> None:
    """A process: a buffer with a pattern, offered until the pipe says so."""
    nixl_transport.prepare_environment()
    buffer = _buffer(torch.device(device))
    pattern = torch.arange(PATTERN, dtype=torch.uint8, device=device)
    buffer.copy_(pattern.repeat(BUFFER_BYTES // PATTERN + 1)[:BUFFER_BYTES])
    torch.cuda.synchronize()
    transport = _transport(kind, "source", buffer)
    pipe.send(Offered(transport.offer(), buffer.data_ptr(), device_memory.export(buffer.data_ptr(), buffer.device)))
    pipe.recv()


class Reader:
    """The sink: one per transport."""

    def __init__(self, kind: TransportKind, device: str, offered: Offered) -> None:
        self.buffer = _buffer(torch.device(device))
        torch.cuda.synchronize()
        self.transport = _transport(kind, f"sink-{os.getpid()}", self.buffer)
        self.peer = self.transport.connect(offered.agent)
        self.offered = offered
        self.random = np.random.default_rng(0)

    def places(self, pieces: Pieces) -> NDArray[np.int64]:
        """Of the pieces, in either buffer."""
        return self.random.permutation(BUFFER_BYTES // pieces.num_bytes)[: pieces.number]

    def wall_s(self, pieces: Pieces, repeats: int) -> list[float]:
        count = BUFFER_BYTES // pieces.num_bytes
        sides = (self.buffer.data_ptr(), (self.buffer.device.index or 0) + 1), (self.offered.address, 1)
        local, remote = (
            self.transport.prepare(None if side == 0 else self.peer, _rows(address, count, pieces.num_bytes, device))
            for side, (address, device) in enumerate(sides)
        )
        seconds: list[float] = []
        for _ in range(repeats + 2):
            here, there = (self.places(pieces).astype(np.int32) for _ in range(2))
            started = time.perf_counter()
            read = self.transport.read(local, here, remote, there)
            while self.transport.poll(read) is ReadState.PENDING:
                pass
            seconds.append(time.perf_counter() - started)
            self.transport.release(read)
            self.check(pieces, here, there)
        self.transport.discard(local)
        self.transport.discard(remote)
        return seconds[2:]

    def check(self, pieces: Pieces, here: NDArray[np.int32], there: NDArray[np.int32]) -> None:
        for index in (0, pieces.number - 1):
            start = int(here[index]) * pieces.num_bytes
            got = self.buffer[start : start + pieces.num_bytes]
            wanted = (
                torch.arange(pieces.num_bytes, device=got.device) + int(there[index]) * pieces.num_bytes
            ) % PATTERN
            assert torch.equal(got.long(), wanted), "other bytes than the source's have arrived"


def _rows(address: int, count: int, num_bytes: int, device: int) -> NDArray[np.uint64]:
    rows = np.empty((count, 3), np.uint64)
    rows[:, 0] = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(num_bytes)
    rows[:, 1], rows[:, 2] = num_bytes, device
    return rows


def device_s(reader: Reader, pieces: Pieces, repeats: int, tactic: Tactic = BEST) -> list[float]:
    """Of the kernel alone."""
    offered, device = reader.offered, reader.buffer.device
    memory = device_memory.opened(offered.memory.handle, offered.memory.address, offered.memory.num_bytes, device)
    origin = memory.here + offered.address - memory.theirs
    gather, lengths = Gather(device), np.full(pieces.number, pieces.num_bytes, np.uint64)
    seconds: list[float] = []
    for _ in range(repeats + 2):
        here, there = (reader.places(pieces).astype(np.uint64) * np.uint64(pieces.num_bytes) for _ in range(2))
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(gather.stream):
            torch.cuda._sleep(2_000_000)  # a millisecond: the kernel is queued when the clock starts
        started.record(gather.stream)
        gather(there + np.uint64(origin), here + np.uint64(reader.buffer.data_ptr()), lengths, tactic)
        ended.record(gather.stream)
        ended.synchronize()
        seconds.append(started.elapsed_time(ended) / 1e3)
    device_memory.close(memory, device)
    return seconds[2:]


def copy_bytes_per_s(device: str, other: str) -> float:
    """One copy of 1 GB, best of ten: the link's rate."""
    there, here = (torch.zeros(1 << 30, dtype=torch.uint8, device=each) for each in (other, device))
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize(other)
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        here.copy_(there)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return there.numel() / best


def _offers(kind: TransportKind, device: str) -> Iterator[Offered]:
    with process(source, kind, device) as pipe:
        yield receive(pipe)
        pipe.send("enough")


def _figure(name: str, pieces: Pieces, seconds: list[float], link: float) -> Figure:
    rate = pieces.total / statistics.median(seconds)
    note = f"{1e6 * statistics.median(seconds):.1f} µs, worst {1e6 * max(seconds):.1f}"
    target = TARGETS_GB_S.get(pieces)
    note += f"; target {target:g}" if target and name.endswith("device") else ""
    progress(f"{name} {pieces}: {rate / 1e9:.1f} GB/s")
    return Figure(f"{name}, {pieces}", rate / 1e9, "GB/s", link / 1e9, note=note)


def measure(repeats: int, devices: tuple[str, str]) -> list[Figure]:
    link = copy_bytes_per_s(devices[1], devices[0])
    figures = [Figure("copy of 1 GB", link / 1e9, "GB/s", note=f"{devices[0]} to {devices[1]}")]
    kinds: tuple[TransportKind, ...] = ("ipc", "nixl")
    for kind in kinds:
        for offered in _offers(kind, devices[0]):
            reader = Reader(kind, devices[1], offered)
            for pieces in CASES:
                if kind == "ipc":
                    figures.append(_figure("ipc, device", pieces, device_s(reader, pieces, repeats), link))
                figures.append(_figure(f"{kind}, wall", pieces, reader.wall_s(pieces, repeats), link))
            reader.transport.close()
    return figures


def sweep(repeats: int, devices: tuple[str, str]) -> None:
    for offered in _offers("ipc", devices[0]):
        reader = Reader("ipc", devices[1], offered)
        for pieces in CASES:
            for programs, words, warps in product((24, 32, 48, 64, 132, 264), (1024, 2048, 4096, 8192), (8, 16, 32)):
                if words // warps > 512:
                    continue
                seconds = device_s(reader, pieces, repeats, Tactic(programs, words, warps))
                rate = pieces.total / statistics.median(seconds) / 1e9
                progress(f"{pieces}: {programs} programs, {words} words, {warps} warps: {rate:.1f} GB/s")
        reader.transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    nixl_transport.prepare_environment()
    devices = ("cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
    if options.sweep:
        sweep(options.repeats, devices)
        return
    name = torch.cuda.get_device_name()
    what = f"pieces of device memory between two processes on {name}"
    details: dict[str, object] = {"gpu": name, "devices": list(devices)}
    figures = measure(options.repeats, devices)
    publish(Report("gpu_transfer", what, {"repeats": options.repeats}, figures, Setting.here(), details), options.json)


if __name__ == "__main__":
    main()
