"""A request is cancelled, or its ingress goes, in every state at every stage: it always ends in the same place.

Both workers take one turn of their loops at a time, so a state is reached for certain; words, bytes and engines are
real. One pair of workers serves the whole table: what a row left behind would be seen in the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

import pytest

from benchmarks import checkpoint
from cluster import config_file
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from cluster.words_thread import WordsThread
from tests.support.raw_ingress import RawIngress
from tests.support.stepped_worker import SteppedWorker, stepped_pair
from tests.support.words import words_config

BLOCK_SIZE, CHUNK = 16, 32
NUM_BLOCKS = 24
PROMPT = tuple(range(1, 3 * CHUNK + 6))  # four chunks, the last of them partial
HOG = tuple(range(200, 200 + 18 * BLOCK_SIZE))  # leaves no room for PROMPT
NUM_TOKENS = 12
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
COMPUTED, PULLED = "sluice_engine_computed_tokens_total", "sluice_transfer_pulled_blocks_total"


class Scene:
    """One pair of workers, one ingress at a time."""

    def __init__(self, words: WordsThread, prefill: SteppedWorker, decode: SteppedWorker) -> None:
        self.prefill, self.decode = prefill, decode
        self.ingress = RawIngress(words)
        prefill.forget()
        decode.forget()
        self.request = ""
        self.hogs: list[str] = []

    def submit(self, prompt: tuple[int, ...] = PROMPT, *, local: bool = False, num_tokens: int = NUM_TOKENS) -> str:
        source = self.decode if local else self.prefill
        sampling = replace(SAMPLING, max_tokens=num_tokens)
        asked = self.ingress.submit(self.decode.member, source.member, prompt, sampling)
        self.request = asyncio.run(asked)
        self.decode.until_told("submit")
        return self.request

    @property
    def num_told(self) -> int:
        return self.ingress.num_tokens.get(self.request, 0)

    def cancel(self) -> None:
        for request in (*self.hogs, self.request):
            self.ingress.cancel(self.decode.member, request)
            self.decode.until_told("cancel")

    def leave(self) -> None:
        self.ingress.stop()
        self.decode.until_told("broken")

    def end(self) -> None:
        """Decode takes it in, prefill hears of it; then both turn until nothing is open, which is bounded."""
        self.decode.turn()
        to_prefill = self.decode.worker._pairs.pick((), ())
        assert to_prefill is not None
        for request in (*self.hogs, self.request):  # behind all that was said of it; means nothing to a source
            marker = pb.KvFailed(key=pb.RequestKey(request_id=request, attempt=1))
            to_prefill.send(pb.Frame(kv_failed=marker))
            self.prefill.until_told("kv_failed")
        self.decode.let_bytes_move()
        self.decode.turn_until(self._over)

    def computed(self) -> tuple[float, float]:
        return self.prefill.count(COMPUTED), self.decode.count(COMPUTED)

    def _over(self) -> bool:
        self.prefill.turn()
        return not self.prefill.worker._open_work() and not self.decode.worker._open_work()


# ---------------------------------------------------------------- states, each from the one before


def submitted(scene: Scene) -> None:
    scene.submit()


def pending(scene: Scene) -> None:
    """There is no room for its blocks."""
    scene.hogs.append(scene.submit(HOG, num_tokens=80))
    scene.decode.turn_until(lambda: _turned(scene.prefill) and scene.decode.load.num_running == 1)
    scene.submit()
    scene.decode.turn()
    assert scene.decode.worker._decode.num_pending == 1


def asked(scene: Scene) -> None:
    submitted(scene)
    scene.decode.turn()
    num_asked = 1 + len(scene.hogs)
    assert scene.decode.load.num_pulling == num_asked
    for _ in range(num_asked):
        scene.prefill.until_told("kv_request")


def queued_at_prefill(scene: Scene) -> None:
    """Another prompt has all of the step's tokens."""
    scene.hogs.append(scene.submit(HOG[: 4 * CHUNK]))
    asked(scene)
    scene.prefill.turn()
    assert (scene.prefill.load.num_waiting, scene.prefill.load.num_running) == (1, 1)


def first_chunk(scene: Scene) -> None:
    """A ticket is on its way, decode has not taken it."""
    asked(scene)
    scene.prefill.turn()
    assert scene.prefill.worker._prefill.num_open == 1 and scene.prefill.load.num_leases == 1
    scene.decode.until_told("ticket")


def reading_first_chunk(scene: Scene) -> None:
    scene.decode.hold_bytes()
    first_chunk(scene)
    scene.decode.turn()
    assert scene.decode.worker._parts.sink.num_in_flight == 1 and not scene.num_told


def between_chunks(scene: Scene) -> None:
    """The first blocks are here, the others are not computed."""
    num_pulled = scene.decode.count(PULLED)
    first_chunk(scene)
    scene.decode.turn_until(lambda: scene.decode.count(PULLED) > num_pulled)
    assert scene.decode.load.num_pulling == 1


def computed(scene: Scene) -> None:
    """Every ticket is on its way."""
    asked(scene)
    scene.prefill.turn(4)
    assert not scene.prefill.worker._prefill.num_open and scene.prefill.load.num_leases == 1
    for _ in range(4):
        scene.decode.until_told("ticket")


def reading_last_chunk(scene: Scene) -> None:
    """The first token is told, its KV is not here."""
    scene.decode.hold_bytes()
    computed(scene)
    scene.decode.turn_until(lambda: scene.num_told == 1)
    assert scene.decode.load.num_pulling == 1


def streaming(scene: Scene) -> None:
    computed(scene)
    scene.decode.turn_until(lambda: scene.num_told >= 4)
    assert scene.decode.load.num_running == 1


def computing_here(scene: Scene) -> None:
    """Aggregated: the decode worker computes the prompt."""
    scene.submit(local=True)
    scene.decode.turn()
    assert scene.decode.load.num_running == 1 and not scene.num_told


def finished(scene: Scene) -> None:
    streaming(scene)
    scene.decode.turn_until(lambda: scene.num_told == NUM_TOKENS)


def _turned(worker: SteppedWorker) -> bool:
    worker.turn()
    return True


# ---------------------------------------------------------------- the table


class Way(Enum):
    CANCEL = auto()  # by its client
    GONE = auto()  # the ingress, with all its requests


@dataclass(frozen=True)
class Row:
    reach: Callable[[Scene], None]
    num_told: int  # tokens that the ingress has
    num_prefilled: int  # tokens of prompts computed by the prefill worker
    num_leases: int


TABLE = (
    Row(submitted, 0, 0, 0),
    Row(pending, 0, 0, 0),
    Row(asked, 0, 0, 0),
    Row(queued_at_prefill, 0, CHUNK, 1),  # of the other prompt
    Row(first_chunk, 0, CHUNK, 1),
    Row(reading_first_chunk, 0, CHUNK, 1),
    Row(between_chunks, 0, CHUNK, 1),
    Row(computed, 0, len(PROMPT), 1),
    Row(reading_last_chunk, 1, len(PROMPT), 1),
    Row(streaming, 4, len(PROMPT), 1),
    Row(computing_here, 0, 0, 0),
    Row(finished, NUM_TOKENS, len(PROMPT), 1),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WordsThread, SteppedWorker, SteppedWorker]]:
    config = config_file.load(
        None,
        settings={
            "model.path": str(checkpoint.write(tmp_path_factory.mktemp("model"), checkpoint.TINY)),
            "model.load_format": "dummy",
            "kv.block_size": BLOCK_SIZE,
            "kv.num_blocks": NUM_BLOCKS,
            "kv.prefix_cache": False,  # so that every row computes
            "scheduler.max_batched_tokens": CHUNK,
            "scheduler.chunk_tokens": CHUNK,
            "scheduler.max_sequences": 4,
            "words.heartbeat_timeout_s": 60.0,
            "words.step_timeout_s": 600.0,  # no turn is no failure here
            "transfer.lease_s": 600.0,
            "log.level": "error",
        },
    )
    with WordsThread(config=words_config(heartbeat_timeout_s=60)) as words, stepped_pair(config) as (prefill, decode):
        yield words, prefill, decode


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.reach.__name__)
def test_it_ends_in_the_same_place(pair: tuple[WordsThread, SteppedWorker, SteppedWorker], row: Row, way: Way) -> None:
    scene = Scene(*pair)
    computed_before, _ = scene.computed()
    row.reach(scene)
    assert scene.num_told >= row.num_told and (row.num_told > 1 or scene.num_told == row.num_told)
    computed, computed_here = scene.computed()
    assert computed - computed_before == row.num_prefilled or row.reach is pending
    assert scene.prefill.load.num_leases == row.num_leases

    (scene.cancel if way is Way.CANCEL else scene.leave)()
    scene.end()

    assert scene.computed() == (computed, computed_here), "something was computed for nobody"
    for worker in (scene.prefill, scene.decode):
        load = worker.load
        assert (load.num_waiting, load.num_running, load.num_pulling, load.num_leases) == (0, 0, 0, 0)
        [group] = load.groups
        assert group.free == group.num_blocks == NUM_BLOCKS
        ledger = worker.worker._parts.ledger
        assert ledger.num_posted == ledger.num_quarantined == 0
        ledger.check_integrity()
        worker.worker._parts.blocks.check_integrity()
    if way is Way.CANCEL and row.reach is not finished:
        last = asyncio.run(scene.ingress.end_of(scene.request))
        assert (last.finish, last.failure.code) == (pb.ERROR, pb.CANCELLED)
        scene.leave()  # heard of here, not in the next scene
