"""The log of a prefix cache, over a real block manager: a reader that follows it, gaps or not, knows what is cached."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hashing import split
from cluster.protos import worker_pb2 as pb
from workers import block_log as module
from workers.block_log import BlockLog
from workers.engine.block_manager import BlockManager, GroupCapacity


def hash_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def fill(blocks: BlockManager, numbers: list[int]) -> None:
    reserved = blocks.reserve([len(numbers)] * len(blocks.groups))
    assert reserved is not None
    for group, ids in enumerate(reserved):
        for block, number in zip(ids, numbers, strict=True):
            blocks.mark_ready(group, block, hash_of(number))
        blocks.release(group, ids)


class Reader:
    """Sets where the router has its index."""

    def __init__(self) -> None:
        self.last_id = 0
        self.known: set[bytes] = set()

    def hear(self, events: pb.BlockEvents) -> None:
        if events.dump or events.cleared:
            self.known.clear()
        if not events.dump:
            assert events.id in (self.last_id, self.last_id + 1)
        self.known -= set(split(events.removed))
        self.known |= set(split(events.stored))
        self.last_id = events.id


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_groups=st.integers(1, 2), max_kept=st.integers(0, 6))
def test_readers_know_what_a_lookup_finds(seed: int, num_groups: int, max_kept: int) -> None:
    """One hears everything, one now and then."""
    random = Random(seed)
    blocks = BlockManager([GroupCapacity(f"g{group}", 24, 4) for group in range(num_groups)])
    log = BlockLog(blocks, max_kept=max_kept)
    always, sometimes = Reader(), Reader()
    for _ in range(30):
        action = random.random()
        if action < 0.6:
            fill(blocks, random.sample(range(60), random.randrange(1, 10)))
        elif action < 0.65:
            blocks.clear_cache()
        if action > 0.4 and (events := log.collect()) is not None:
            always.hear(events)
        if random.random() < 0.2:  # perhaps with changes that are not collected yet
            for events in log.after(sometimes.last_id):
                sometimes.hear(events)
            assert log.last_id == sometimes.last_id
    if (events := log.collect()) is not None:
        always.hear(events)
    for events in log.after(sometimes.last_id):
        sometimes.hear(events)
    hashes, groups = [hash_of(number) for number in range(60)], range(num_groups)
    found = {hash_ for hash_ in hashes if all(blocks.lookup(group, [hash_], 1) for group in groups)}
    assert always.known == sometimes.known == found and always.last_id == log.last_id


def test_a_range_while_it_is_kept_then_a_dump() -> None:
    blocks = BlockManager([GroupCapacity("self", 64, 4)])
    log = BlockLog(blocks, max_kept=3)
    assert log.collect() is None and [(e.id, e.dump) for e in log.after(0)] == [(0, True)]
    for number in range(5):
        fill(blocks, [number])
        log.collect()
    assert [(e.id, e.dump) for e in log.after(5)] == [(5, False)]  # nothing is missing: said so
    assert [(e.id, e.dump) for e in log.after(3)] == [(3, False), (4, False), (5, False)]
    assert [(e.id, e.dump) for e in log.after(2)] == [(2, False), (3, False), (4, False), (5, False)]
    assert [(e.id, e.dump) for e in log.after(1)] == [(5, True)]
    assert [(e.id, e.dump) for e in log.after(9)] == [(5, True)]  # of a log that this one is not
    assert len(split(log.after(1)[0].stored)) == 5


def test_outputs_of_encoders_are_told_beside_prefixes() -> None:
    """One is known by its name in its own group."""
    blocks = BlockManager([GroupCapacity("self", 8, 4), GroupCapacity("cross", 8, 4, is_fixed=True)])
    log, reader = BlockLog(blocks), Reader()
    for group, numbers in ((0, [1, 2]), (1, [3, 4, 5])):
        reserved = blocks.reserve([len(numbers) * (group == 0), len(numbers) * (group == 1)])
        assert reserved is not None
        for block, number in zip(reserved[group], numbers, strict=True):
            blocks.mark_ready(group, block, hash_of(number))
        blocks.release(group, reserved[group])
    events = log.collect()
    assert events is not None
    reader.hear(events)
    assert reader.known == {hash_of(number) for number in (1, 2, 3, 4, 5)}
    blocks.reserve([0, 6])  # evicts the last block of the output
    events = log.collect()
    assert events is not None
    reader.hear(events)
    dump = Reader()
    dump.hear(log.after(0)[0])
    assert reader.known == dump.known == {hash_of(number) for number in (1, 2, 3, 4)}


def test_what_is_kept_is_bounded_by_hashes_too() -> None:
    blocks = BlockManager([GroupCapacity("self", 1000, 4)])
    log = BlockLog(blocks)
    count = 1 + module.MAX_KEPT_HASHES // 1000
    for round_ in range(count + 2):
        fill(blocks, list(range(round_ * 500, round_ * 500 + 500)))
        log.collect()
    assert log._num_kept <= module.MAX_KEPT_HASHES
    assert len(log._kept) < count + 2
