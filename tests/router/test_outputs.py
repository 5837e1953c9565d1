"""Requests go where the output of their encoder is: what holding it is worth, and how a router hears of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Role
from cluster.hashing import chain_root, encoder_hashes
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from router.cost import Weights, costs_of, total_of
from router.offer import Demand, Offer
from router.outputs import OutputDemand, OutputWork, output_key
from router.pairing import Pairing
from router.plan import Candidate
from router.policy import at_home
from router.prefix_index import keys_of
from tests.support.routing import Desk, Stage, desk, eventually, gather, play
from tests.support.scripted_worker import FOREVER, ScriptedWorker, Wait
from workers.engine.block_manager import BlockManager, GroupCapacity

BLOCK = 16
SOURCE = tuple(range(400))
NUM_BLOCKS = 100  # of 4 tokens


def worker(name: str, role: Role, rates: dict[str, float] | None = None, *, speed: float = 0.0) -> Candidate:
    return Candidate(
        name=name,
        incarnation=name,
        roles=frozenset({role}),
        warm_sources=rates or {},
        block_bytes=1000,
        prefill_tokens_per_s=speed,
    )


# ---------------------------------------------------------------- what it is worth


def test_who_lacks_an_output_reads_it_or_fetches_it() -> None:
    rates = {"e0": 1e6, "p0": 1e6, "p1": 0.0}
    candidates = [
        worker("e0", Role.ENCODE),
        worker("d0", Role.DECODE, rates, speed=320.0),
        worker("d1", Role.DECODE, rates, speed=320.0),
        worker("p0", Role.PREFILL, {"e0": 1e3}, speed=320.0),
        worker("p1", Role.PREFILL, {"e0": 1e5}, speed=320.0),
    ]
    pairing = Pairing(candidates)

    def offer(*holders: str) -> Offer:
        output = OutputDemand(10, np.array([each.name in holders for each in candidates]))
        demand = Demand(num_tokens=BLOCK, block_size=BLOCK, output=output)
        return Offer.of(candidates, pairing, np.ones((2, 3), np.bool_), demand)

    nobody, decoder, encoder = offer(), offer("d1", "p0"), offer("e0", "d1")
    # By p0, by p1, and by itself: reading costs as much as computing, and fetching afterwards the least that it can.
    assert costs_of(nobody).prefill.tolist() == [[11, 11, 11]] * 2
    moved = costs_of(nobody).transfer[:, :2]
    assert (costs_of(decoder).transfer[:, :2] - moved).tolist() == [[0, 0], [-0.5, -0.5]]
    assert costs_of(decoder).prefill.tolist() == [[1, 11, 11], [1, 11, 1]]
    # From e0: p0's link is too slow to be better than reading, p1 takes 0.1 s for 10 blocks in which it computes 2.
    assert encoder.output is not None
    assert encoder.output.read.tolist() == pytest.approx([0, 0.5, 0, 10, 2])
    assert costs_of(encoder).prefill == pytest.approx(np.array([[11, 3, 1.5], [11, 3, 1]]))


@given(
    held=st.lists(st.booleans(), min_size=6, max_size=6),
    speeds=st.lists(st.sampled_from((0.0, 50.0, 5e4)), min_size=6, max_size=6),
    rate=st.sampled_from((0.0, 1e3, 1e6)),
    weight=st.sampled_from((1.0, 2.5)),
)
def test_a_decision_counts_as_the_route_card_does(
    held: list[bool], speeds: list[float], rate: float, weight: float
) -> None:
    roles = [Role.ENCODE, Role.ENCODE, Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE]
    names = [f"w{index}" for index in range(6)]
    candidates = [
        worker(name, role, dict.fromkeys(names, rate), speed=speed)
        for name, role, speed in zip(names, roles, speeds, strict=True)
    ]
    pairing, output = Pairing(candidates), OutputDemand(7, np.array(held))
    demand = Demand(num_tokens=50, block_size=BLOCK, output=output)
    offer = Offer.of(candidates, pairing, np.ones((2, 3), np.bool_), demand)
    assert total_of(offer, Weights(weight)) == pytest.approx(costs_of(offer, Weights(weight)).total)
    work = OutputWork.of(output, candidates, pairing, BLOCK)
    for has, read, fetch in zip(held, work.read, work.fetch, strict=True):
        assert (read == fetch == 0) if has else (7 >= read >= fetch > 0)


# ---------------------------------------------------------------- how it is heard of


def cache(num_outputs: int = 0) -> BlockManager:
    """With the first blocks of the output of SOURCE."""
    blocks = BlockManager([GroupCapacity("self", 8, 4), GroupCapacity("cross", 160, 4, is_fixed=True)])
    reserved = blocks.reserve([0, num_outputs])
    assert reserved is not None
    for block, hash_ in zip(reserved[1], outputs(), strict=False):
        blocks.mark_ready(1, block, hash_)
    blocks.release(1, reserved[1])
    return blocks


def outputs(source: tuple[int, ...] = SOURCE) -> list[bytes]:
    return encoder_hashes(chain_root(b"h" * 16, encoder_tokens=source), len(source) // 4)


def is_known(at: Desk, who: ScriptedWorker) -> bool:
    feed = at.router._navigator.feed
    seat = feed.seat(who.incarnation, 0)
    return seat >= 0 and bool(int(feed.index.holders(keys_of(outputs()[-1]))[0, 0]) >> seat & 1)


async def placed(at: Desk, workers: list[ScriptedWorker], source: tuple[int, ...]) -> tuple[str, str]:
    """By whom it is encoded and decoded. It ends with the scene."""
    before = [len(each.submits) for each in workers]
    request = at.request(prompt_token_ids=(0,), encoder_token_ids=source, max_tokens=2)
    task = asyncio.create_task(gather(at.router, request))
    await eventually(lambda: sum(len(each.submits) for each in workers) == sum(before) + 1)
    assert not task.done()
    (decode,) = [each for each, count in zip(workers, before, strict=True) if len(each.submits) > count]
    (encode,) = [stage for stage in decode.submits[-1].plan.stages if stage.stage == pb.ENCODE]
    return encode.worker.name, decode.name


def test_an_output_is_read_where_it_is(words: WordsThread, stage: Stage) -> None:
    """Encoders and decoders that hold it are preferred to its home, and to those whose turn it is; equal inputs that
    arrive together meet before anybody reports; what is evicted is not counted on."""
    names = [f"encode-{index}" for index in range(4)]
    root = chain_root(b"h" * 16, encoder_tokens=SOURCE)
    assert output_key(root, len(SOURCE), 4) == keys_of(outputs()[-1])
    home = at_home(root.hex(), [worker(name, Role.ENCODE) for name in names]).name
    holder, part = [name for name in names if name != home][:2]
    caches = {name: cache({holder: NUM_BLOCKS, part: NUM_BLOCKS - 1}.get(name, 0)) for name in names}
    encoders = {name: stage.encode(name, cache=blocks) for name, blocks in caches.items()}
    decodes = [
        stage.decode(
            f"decode-{index}", Wait(), FOREVER, sources=encoders.values(), cache=cache(NUM_BLOCKS * (index == 2))
        )
        for index in range(4)
    ]

    async def scene() -> None:
        async with desk(words, policy="kv_aware", local_prefill="always") as at:
            await at.connect(*encoders.values(), *decodes)
            await eventually(lambda: is_known(at, encoders[holder]) and is_known(at, decodes[2]))
            assert [await placed(at, decodes, SOURCE) for _ in range(3)] == [(holder, "decode-2")] * 3
            caches[holder].reserve([0, 61])  # evicts one block of them, the last
            encoders[holder].tell_blocks()
            await eventually(lambda: not is_known(at, encoders[holder]))

            other = SOURCE[::-1]
            first, *rest = [await placed(at, decodes, other) for _ in range(3)]
            name = chain_root(b"h" * 16, encoder_tokens=other).hex()
            assert first[0] == at_home(name, [worker(name, Role.ENCODE) for name in names]).name
            assert first[1] != "decode-2" and [each[1] for each in rest] == [first[1]] * 2
            for each in decodes:
                each.go_on()

    play(scene)
