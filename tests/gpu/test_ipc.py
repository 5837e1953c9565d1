"""Blocks between GPU processes by one kernel over memory opened with CUDA IPC: bytes, generations, and death."""

from __future__ import annotations

import os
import signal
from random import Random

import numpy as np
import pytest
import torch

from kvtransfer.connector import Outcome, ReadLimits
from kvtransfer.layout import GroupSpec, KvGeometry, PageFormat, RegionSpec
from tests.support.kv_builders import latent_geometry
from tests.support.kv_process import RankProcess

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

GEOMETRY = latent_geometry(num_layers=4, block_size=16, row_size=64)
DEVICES = [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")]
NUM_BLOCKS = 32


def needs(devices: tuple[str, str]) -> None:
    if devices[1] == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")


def rows(geometry_rows: int, *, layers: int = 1) -> KvGeometry:
    """One region of float16 rows."""
    region = RegionSpec(
        name="latents",
        num_layers=layers,
        page_format=PageFormat.ROWS,
        dtype="float16",
        block_size=64,
        row_size=geometry_rows,
    )
    return KvGeometry((GroupSpec("self", 64, (region,)),), "interleaved")


@pytest.mark.parametrize("devices", DEVICES)
def test_pulls_are_bit_equal_and_checked_by_generation(devices: tuple[str, str]) -> None:
    needs(devices)
    source, sink = (
        RankProcess(name, GEOMETRY, NUM_BLOCKS, device=device, transport="ipc")
        for name, device in zip(("source", "sink"), devices, strict=True)
    )
    with source, sink:
        connected = sink.connect(source)
        assert (connected.error, connected.transport) == (None, "ipc")
        blocks, into, contents = [3, 7, 8, 31, 1], [30, 2, 3, 4, 9], [11, 12, 13, 14, 15]
        source.write(blocks, contents, generation=5)
        done = sink.pull(source, blocks, into, [5] * 5)
        assert (done.outcome, done.stale, done.error) == (Outcome.OK, (), "")
        assert sink.read(into, contents) == [True] * 5
        assert sink.read([1, 5], [15, 12]) == [False, False], "nothing else was touched"
        source.write([7, 31], [98, 99], generation=6)
        done = sink.pull(source, blocks, into, [5] * 5)
        assert (done.outcome, done.stale) == (Outcome.STALE, (1, 3))
        sink.disconnect(source)
        assert sink.pull(source, blocks, into, [5] * 5).outcome is Outcome.LOST
        assert sink.connect(source).error is None, "the same incarnation may come back"
        assert sink.pull(source, [7], [1], [6]).outcome is Outcome.OK
        assert sink.read([1], [98]) == [True]
        assert (sink.stop(), source.stop()) == (0, 0)


def test_rows_that_the_kernel_cannot_copy_go_the_other_way() -> None:
    geometry = KvGeometry(
        (
            GroupSpec(
                "self",
                1,
                (
                    RegionSpec(
                        name="odd", num_layers=3, page_format=PageFormat.ROWS, dtype="float16", block_size=1, row_size=3
                    ),
                ),
            ),
        ),
        "none",
    )
    source, sink = (RankProcess(name, geometry, 8, device="cuda", transport="ipc") for name in ("source", "sink"))
    with source, sink:
        assert sink.connect(source).error is None
        source.write([1, 2], [5, 6], generation=1)
        assert sink.pull(source, [1, 2], [4, 3], [1, 1]).outcome is Outcome.OK
        assert sink.read([4, 3], [5, 6]) == [True, True]


@pytest.mark.parametrize("tactic", [(32, 8192, 32), (264, 2048, 8), (3, 256, 1)], ids=str)
def test_pieces_of_all_lengths(tactic: tuple[int, int, int]) -> None:
    """Against copies of slices; the pool is longer than 2**32 bytes and the pieces lie at its ends, too."""
    from kvtransfer.gather import Gather, Tactic

    random = Random(0)
    pool = torch.empty(5 << 30, dtype=torch.uint8, device="cuda")
    near = torch.randint(256, (2, 8 << 20), dtype=torch.uint8, device="cuda")
    pool[: 8 << 20], pool[-(8 << 20) :] = near[0], near[1]
    target = torch.zeros(24 << 20, dtype=torch.uint8, device="cuda")
    expected = target.clone()
    pieces: list[tuple[int, int, int]] = []
    end = 0
    for _ in range(60):
        length = 16 * random.choice([1, 3, 64, 4608, random.randrange(1, 20_000)])
        start = random.choice([0, len(pool) - (8 << 20)]) + 16 * random.randrange((8 << 20) // 16 - length // 16 + 1)
        end += 16 * random.randrange(4)
        pieces.append((start, end, length))
        expected[end : end + length] = pool[start : start + length]
        end += length
    assert end <= len(target)
    random.shuffle(pieces)
    table = np.array(pieces, np.uint64)
    torch.cuda.synchronize()
    gather = Gather(torch.device("cuda", 0))
    gather(table[:, 0] + pool.data_ptr(), table[:, 1] + target.data_ptr(), table[:, 2], Tactic(*tactic)).synchronize()
    assert torch.equal(target, expected)


def test_nothing_to_copy() -> None:
    from kvtransfer.gather import Gather

    none = np.zeros(0, np.uint64)
    Gather(torch.device("cuda", 0))(none, none, none).synchronize()


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_that_dies_or_freezes_under_reads(
    devices: tuple[str, str], number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    """The sink's device goes on: what it pulls from a living source afterwards is right. 50 deaths in the long form."""
    needs(devices)
    num_deaths = (50 if request.config.getoption("full") else 4) if number is signal.SIGKILL else 3
    geometry = rows(576, layers=61)  # 4.5 MB a block
    random = Random(1)
    limits = ReadLimits(30.0, 2.0)
    names = [f"source-{index}" for index in range(num_deaths)]
    sink = RankProcess("sink", geometry, 160, device=devices[1], transport="ipc", limits=limits)
    spare = RankProcess("spare", geometry, 4, device=devices[0], transport="ipc")
    outcomes: list[Outcome] = []
    with sink, spare:
        assert sink.connect(spare).transport == "ipc"
        while names:
            together, names = names[:8], names[8:]
            sources = [RankProcess(name, geometry, 160, device=devices[0], transport="ipc") for name in together]
            for source in sources:
                with source:
                    assert sink.connect(source).error is None
                    for pull in range(24):
                        sink.submit(source, list(range(1, 151)), list(range(1, 151)), [0] * 150, id=pull + 1)
                    seen = [sink.done().outcome for _ in range(random.randrange(4))]
                    assert source.process.pid is not None
                    os.kill(source.process.pid, number)
                    seen += [sink.done().outcome for _ in range(24 - len(seen))]
                    os.kill(source.process.pid, signal.SIGKILL)  # a frozen one, too
                    later = [sink.done().outcome for _ in range(seen.count(Outcome.STUCK))]
                    assert set(later) <= {Outcome.LOST}
                    assert set(seen) <= {Outcome.OK, Outcome.LOST, Outcome.STUCK}
                    outcomes += seen
                    sink.disconnect(source)
                    generation = len(outcomes)
                    spare.write([1, 2], [generation, generation + 1], generation)
                    assert sink.pull(spare, [2, 1], [157, 158], [generation] * 2).outcome is Outcome.OK
                    assert sink.read([157, 158], [generation + 1, generation]) == [True, True]
        assert sink.stop() == 0
    print(f"{num_deaths} times: {outcomes.count(Outcome.OK)} pulls whole, {outcomes.count(Outcome.LOST)} lost")
    if number is signal.SIGKILL:
        assert Outcome.LOST in outcomes, "no source died under a read"
        assert Outcome.STUCK not in outcomes
