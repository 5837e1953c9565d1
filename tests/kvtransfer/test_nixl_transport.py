"""NIXL between real processes: bytes, generations, death, and what an agent costs its process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.connector import Outcome, ReadLimits
from kvtransfer.nixl_transport import prepare_environment
from tests.support.dying_sources import outcomes_of_deaths
from tests.support.exact_pulls import check_pulls
from tests.support.kv_builders import latent_geometry
from tests.support.kv_process import RankProcess

GEOMETRY = latent_geometry(num_layers=4, block_size=16, row_size=64)
NUM_BLOCKS = 32
pytestmark = pytest.mark.cluster


@pytest.fixture
def pair() -> Iterator[tuple[RankProcess, RankProcess]]:
    source, sink = (RankProcess(name, GEOMETRY, NUM_BLOCKS) for name in ("source", "sink"))
    with source, sink:
        connected = sink.connect(source)
        assert (connected.error, connected.transport) == (None, "nixl")
        assert connected.bytes_per_s > 0
        yield source, sink


def test_pulls_are_bit_equal_checked_by_generation_and_processes_end_well(
    pair: tuple[RankProcess, RankProcess],
) -> None:
    source, sink = pair
    check_pulls(source, sink, GEOMETRY)
    assert sink.idle_cores(0.7) < 0.5, "an agent that waits must not spin"
    assert sink.stop() == 0
    assert source.stop() == 0


def test_handles_for_peers_of_its_host_are_ignored(pair: tuple[RankProcess, RankProcess]) -> None:
    source, sink = pair
    sink.disconnect(source)
    source.offer.ranks[0].ipc.host = b"a host"
    source.offer.ranks[0].ipc.spans.add(address=1 << 40, num_bytes=1 << 30, handle=b"handle")
    connected = sink.connect(source)
    assert (connected.error, connected.transport) == (None, "nixl")
    source.write([3], [11], generation=1)
    assert sink.pull(source, [3], [4], [1]).outcome is Outcome.OK
    assert sink.read([4], [11]) == [True]


def test_a_killed_source_is_lost(pair: tuple[RankProcess, RankProcess]) -> None:
    source, sink = pair
    source.process.kill()
    source.process.join(10)
    done = sink.pull(source, [1, 2], [1, 2], [1, 1])
    assert done.outcome is Outcome.LOST
    assert done.error
    assert sink.connect(source).error is not None
    assert sink.stop() == 0


@pytest.mark.chaos
def test_a_source_killed_or_frozen_mid_read() -> None:
    """Over TCP the source takes part in a read: while it is frozen the read is in flight for certain."""
    limits = ReadLimits(late_read_s=1.0, stuck_read_s=2.0)
    source = RankProcess("source", GEOMETRY, NUM_BLOCKS, ucx_tls="tcp,self")
    sink = RankProcess("sink", GEOMETRY, NUM_BLOCKS, ucx_tls="tcp,self", limits=limits)
    with source, sink:
        assert sink.connect(source).error is None
        source.write([1, 2], [11, 12], generation=1)
        assert sink.pull(source, [1, 2], [1, 2], [1, 1]).outcome is Outcome.OK

        assert source.process.pid
        os.kill(source.process.pid, signal.SIGSTOP)
        sink.submit(source, [1, 2], [3, 4], [1, 1])
        assert sink.done().outcome is Outcome.STUCK

        os.kill(source.process.pid, signal.SIGCONT)
        over = sink.done()
        assert (over.id, over.outcome) == (1, Outcome.LOST), "given up, and over only now"
        assert sink.read([3, 4], [11, 12]) == [True, True], "it wrote long after it had been given up"

        os.kill(source.process.pid, signal.SIGSTOP)
        sink.submit(source, [1, 2], [5, 6], [1, 1], id=2)
        assert not sink.pipe.poll(0.2), "in flight"
        os.kill(source.process.pid, signal.SIGKILL)
        done = sink.done()
        assert (done.id, done.outcome) == (2, Outcome.LOST)
        assert done.seconds < limits.stuck_read_s
        assert sink.stop() == 0


@pytest.mark.full
@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_sources_that_die_under_many_reads(number: signal.Signals) -> None:
    """As tests/gpu has it between GPUs."""
    geometry = latent_geometry(num_layers=61, block_size=16, row_size=576)
    outcomes = outcomes_of_deaths(number, 3, geometry, transport="nixl", num_blocks=60)
    assert outcomes.total() == 3 * 24


def test_environment_without_and_with_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_MODULES", raising=False)
    monkeypatch.delenv("UCX_TLS", raising=False)
    (tmp_path / "mlx5_0").mkdir()
    prepare_environment(infiniband=tmp_path)
    assert "UCX_MODULES" not in os.environ
    assert "UCX_TLS" not in os.environ
    prepare_environment("tcp,self", infiniband=tmp_path / "absent")
    assert os.environ["UCX_MODULES"] == "^ib"
    assert os.environ["UCX_TLS"] == "tcp,self"
    with pytest.raises(ValueError, match="'shm,self' lacks tcp"):
        prepare_environment("shm,self")
