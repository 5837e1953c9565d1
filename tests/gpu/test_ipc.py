"""Blocks between GPU processes by one kernel over memory opened with CUDA IPC: bytes and generations."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from kvtransfer.connector import Outcome
from kvtransfer.layout import GroupSpec, KvGeometry, PageFormat, RegionSpec
from kvtransfer.transport import TransportKind
from tests.support.exact_pulls import check_pulls
from tests.support.kv_builders import latent_geometry
from tests.support.kv_process import RankProcess

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

GEOMETRY = latent_geometry(num_layers=4, block_size=16, row_size=64)
DEVICES = [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")]
NUM_BLOCKS = 32


def needs(devices: tuple[str, str]) -> None:
    if devices[1] == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")


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
        check_pulls(source, sink, GEOMETRY)
        assert (sink.stop(), source.stop()) == (0, 0)


@pytest.mark.parametrize("devices", DEVICES)
def test_both_ways_are_measured_and_the_faster_is_kept(devices: tuple[str, str]) -> None:
    needs(devices)
    source, sink = (
        RankProcess(name, GEOMETRY, NUM_BLOCKS, device=device, transport="auto")
        for name, device in zip(("source", "sink"), devices, strict=True)
    )
    with source, sink:
        connected = sink.connect(source)
        assert connected.error is None and set(connected.rates) == {"ipc", "nixl"}
        assert connected.bytes_per_s == connected.rates[connected.transport] == max(connected.rates.values())
        print({way: f"{rate / 1e9:.2f} GB/s" for way, rate in connected.rates.items()})
        check_pulls(source, sink, GEOMETRY)
        assert (sink.stop(), source.stop()) == (0, 0)


@pytest.mark.parametrize("transport", ["ipc", "auto"])
@pytest.mark.parametrize("devices", DEVICES)
def test_one_with_nixl_alone_reads_and_is_read(devices: tuple[str, str], transport: TransportKind) -> None:
    needs(devices)
    alone = RankProcess("alone", GEOMETRY, NUM_BLOCKS, device=devices[0], transport="nixl")
    other = RankProcess("other", GEOMETRY, NUM_BLOCKS, device=devices[1], transport=transport)
    with alone, other:
        for source, sink, blocks, contents in ((alone, other, [1, 5, 6], [1, 2, 3]), (other, alone, [9, 7], [4, 5])):
            connected = sink.connect(source)
            assert (connected.error, connected.transport) == (None, "nixl")
            source.write(blocks, contents, generation=1)
            into = [block + 16 for block in blocks]
            done = sink.pull(source, blocks, into, [1] * len(blocks))
            assert (done.outcome, done.transport) == (Outcome.OK, "nixl")
            assert all(sink.read(into, contents))
        assert (other.stop(), alone.stop()) == (0, 0)


def test_a_peer_whose_handle_is_refused_is_read_the_other_way() -> None:
    source, sink, gone = (
        RankProcess(name, GEOMETRY, NUM_BLOCKS, device="cuda", transport="ipc") for name in ("source", "sink", "gone")
    )
    with source, sink:
        with gone:
            assert gone.stop() == 0
        source.offer.ranks[0].ipc.CopyFrom(gone.offer.ranks[0].ipc)
        connected = sink.connect(source)
        assert (connected.error, connected.transport) == (None, "nixl")
        check_pulls(source, sink, GEOMETRY)


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
        connected = sink.connect(source)
        assert (connected.error, connected.transport) == (None, "nixl")
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
    sources, destinations = table[:, 0] + pool.data_ptr(), table[:, 1] + target.data_ptr()
    for _ in range(2):  # kernels are compiled the first time, and launched without Triton the second
        target.zero_()
        torch.cuda.synchronize()
        gather(sources, destinations, table[:, 2], Tactic(*tactic)).synchronize()
        assert torch.equal(target, expected)


def test_one_kernel_copies_any_number_of_pieces() -> None:
    from kvtransfer.gather import Gather

    gather, length = Gather(torch.device("cuda", 0)), 4096
    source = torch.randint(256, (1500 * length,), dtype=torch.uint8, device="cuda")
    for count in (1, 2, 16, 33, 1025, 1500, 7):
        target = torch.zeros_like(source)
        torch.cuda.synchronize()
        places = np.arange(count, dtype=np.uint64) * np.uint64(length)
        backwards = np.ascontiguousarray(places[::-1])
        gather(places + source.data_ptr(), backwards + target.data_ptr(), length).synchronize()
        assert torch.equal(target.view(-1, length)[:count], source.view(-1, length)[:count].flip(0))
        assert not target.view(-1, length)[count:].any()


def test_nothing_to_copy() -> None:
    from kvtransfer.gather import Gather

    none = np.zeros(0, np.uint64)
    Gather(torch.device("cuda", 0))(none, none, none).synchronize()
