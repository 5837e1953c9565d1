"""Block events from a worker's log to the index of a router, over a real session: in order, with losses, with ends."""

from __future__ import annotations

import asyncio

from cluster.hashing import block_hashes, chain_root
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from router.prefix_index import keys_of, prefix_depths
from router.router import Router
from tests.support.routing import Desk, Stage, desk, eventually, gather, play
from tests.support.scripted_worker import FOREVER, ScriptedWorker, Wait, membership
from workers.block_log import BlockLog
from workers.engine.block_manager import BlockManager, GroupCapacity

BLOCK_SIZE = 4
ROOT = chain_root(b"h" * 16)
PROMPT = tuple(range(40))
HASHES = block_hashes(ROOT, PROMPT, BLOCK_SIZE)


def cache(num_blocks: int = 64) -> BlockManager:
    return BlockManager([GroupCapacity("self", num_blocks, BLOCK_SIZE)])


def fill(blocks: BlockManager, hashes: list[bytes]) -> list[int]:
    """Computes blocks and lets them go; CACHED afterwards."""
    reserved = blocks.reserve([len(hashes)])
    assert reserved is not None
    for block, hash_ in zip(reserved[0], hashes, strict=True):
        blocks.mark_ready(0, block, hash_)
    blocks.release(0, reserved[0])
    return reserved[0]


def depth(router: Router, worker: ScriptedWorker, hashes: list[bytes] = HASHES) -> int:
    feed = router._navigator.feed
    seat = feed.seat(worker.incarnation, 0)
    return 0 if seat < 0 else int(prefix_depths(feed.index.holders(keys_of(hashes)))[seat])


def num_held(router: Router, worker: ScriptedWorker) -> int:
    feed = router._navigator.feed
    return feed.index.num_held(feed.seat(worker.incarnation, 0))


def alive(at: Desk, worker: ScriptedWorker) -> float:
    return at.metrics.value("sluice_router_event_stream_alive", {"peer": worker.name})


def gaps(at: Desk) -> float:
    return at.metrics.value("sluice_router_event_gaps_total")


def test_a_dump_then_changes_then_the_end(words: WordsThread, stage: Stage) -> None:
    blocks = cache()
    fill(blocks, HASHES[:6])
    decode, other = stage.decode(cache=blocks), stage.decode("decode-1")

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(decode, other)
            await eventually(lambda: alive(at, decode) == alive(at, other) == 1)
            assert (depth(at.router, decode), depth(at.router, other)) == (6, 0)
            fill(blocks, HASHES[6:])
            decode.tell_blocks()
            await eventually(lambda: depth(at.router, decode) == 10)
            blocks.reserve([57])  # evicts the ends of both first: what remains is a prefix
            decode.tell_blocks()
            await eventually(lambda: num_held(at.router, decode) == 7)
            assert depth(at.router, decode) == len(blocks.lookup(0, HASHES, 10))
            blocks.clear_cache()
            fill(blocks, HASHES[:2])
            decode.tell_blocks()
            await eventually(lambda: num_held(at.router, decode) == 2)
            assert depth(at.router, decode) == 2 and gaps(at) == 0
            assert at.metrics.value("sluice_router_indexed_blocks") == 2
            at.router.update_membership(membership(other, version=2))
            await eventually(lambda: at.metrics.value("sluice_router_indexed_blocks") == 0)
            assert depth(at.router, decode) == 0
            assert at.router._navigator.feed.seat(decode.incarnation, 0) == -1

    play(scene)


def test_what_is_lost_on_the_way_is_asked_for_and_what_is_known_ignored(words: WordsThread, stage: Stage) -> None:
    blocks = cache()
    decode = stage.decode(cache=blocks)

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(decode)
            await eventually(lambda: alive(at, decode) == 1)
            for number in range(4):  # one batch each, two of them lost
                fill(blocks, HASHES[number : number + 1])
                decode.tell_blocks(lost=number in (1, 2))
            await eventually(lambda: depth(at.router, decode) == 4)
            assert gaps(at) == 1 and [query.last_id for query in decode.queries] == [0, 1]
            blocks.clear_cache()
            decode.tell_blocks(lost=True)  # and nothing follows: the load report tells
            decode.report_load()
            await eventually(lambda: at.metrics.value("sluice_router_event_lag_batches", {"peer": "decode-0"}) == 1)
            fill(blocks, HASHES[:1])
            decode.tell_blocks()
            await eventually(lambda: num_held(at.router, decode) == 1)
            assert gaps(at) == 2 and decode.queries[-1].last_id == 4  # a range: nothing was sent twice
            assert decode.num_dumps == 1 and decode.block_log.last_id == 6
            for events in decode.block_log.after(3):  # once more, as a peer that is mistaken would
                decode.send_blocks(events)
            fill(blocks, HASHES[1:3])
            decode.tell_blocks()
            await eventually(lambda: depth(at.router, decode) == 3)
            assert num_held(at.router, decode) == 3 and gaps(at) == 2

    play(scene)


def test_a_broken_session_goes_on_where_it_ended_or_with_a_dump(words: WordsThread, stage: Stage) -> None:
    blocks = cache()
    decode = stage.decode()
    decode.block_log = BlockLog(blocks, max_kept=2)

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(decode)
            fill(blocks, HASHES[:3])
            decode.tell_blocks()
            await eventually(lambda: depth(at.router, decode) == 3)
            for num_known, num_batches in ((3, 2), (5, 3)):  # the log keeps two batches
                for number in range(num_known, num_known + num_batches):
                    fill(blocks, HASHES[number : number + 1])
                    decode.tell_blocks(lost=True)
                decode.break_sessions()
                await eventually(lambda known=num_known + num_batches: depth(at.router, decode) == known)
                assert num_held(at.router, decode) == num_known + num_batches and alive(at, decode) == 1
            assert [query.last_id for query in decode.queries] == [0, 1, 3]
            assert decode.num_dumps == 2 and gaps(at) == 0  # the first, and the one that replaced what was known

    play(scene)


def test_bad_hashes_end_the_session_and_nothing_else(words: WordsThread, stage: Stage) -> None:
    decode = stage.decode(cache=cache())

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(decode)
            await eventually(lambda: alive(at, decode) == 1)
            decode.send_blocks(pb.BlockEvents(id=1, stored=b"no hash"))
            await eventually(lambda: at.metrics.value("sluice_words_broken_sessions_total", {"reason": "closed"}) == 1)
            await eventually(lambda: alive(at, decode) == 1)  # dialed again
            assert num_held(at.router, decode) == 0

    play(scene)


def test_a_long_dump_is_indexed_in_slices(words: WordsThread, stage: Stage) -> None:
    blocks = cache(9000)
    hashes = [number.to_bytes(8, "little") + bytes(8) for number in range(1, 9001)]
    fill(blocks, hashes)
    decode = stage.decode(cache=blocks)

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(decode)
            await eventually(lambda: num_held(at.router, decode) > 0)
            await eventually(lambda: not at.router._navigator.feed.behind)
            assert num_held(at.router, decode) == depth(at.router, decode, hashes) == 9000

    play(scene)


def test_siblings_follow_before_the_first_event(words: WordsThread, stage: Stage) -> None:
    workers = [stage.decode(f"decode-{i}", Wait(), FOREVER) for i in range(3)]

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(*workers)
            await gather_placed(at, workers, PROMPT)
            (first,) = [worker for worker in workers if worker.submits]
            await gather_placed(at, workers, PROMPT)  # waiting for ten blocks is better than computing them again
            assert len(first.submits) == 2
            await gather_placed(at, workers, tuple(range(100, 140)))
            assert len(first.submits) == 2  # another prompt goes where nothing waits
            for worker in workers:
                worker.go_on()

    play(scene)


async def gather_placed(at: Desk, workers: list[ScriptedWorker], prompt: tuple[int, ...]) -> None:
    """Returns when the request has arrived; it ends with the scene."""
    before = sum(len(worker.submits) for worker in workers)
    request = at.request(prompt_token_ids=prompt, max_tokens=2)
    task = asyncio.create_task(gather(at.router, request))
    await eventually(lambda: sum(len(worker.submits) for worker in workers) == before + 1)
    assert not task.done()
