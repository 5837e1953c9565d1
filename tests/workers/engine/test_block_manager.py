"""Block states, references, fences and events, against a plain model of what each block must be."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.block_manager import BlockManager, BlockState, EventKind, GroupCapacity

SIZES = (6, 3)  # blocks of the two groups


def manager(*sizes: int, enable_prefix_cache: bool = True) -> BlockManager:
    groups = [GroupCapacity(f"g{i}", size, 4) for i, size in enumerate(sizes)]
    return BlockManager(groups, enable_prefix_cache=enable_prefix_cache)


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


@dataclass
class Owner:
    """One holder of references: the blocks it reserved or acquired, in one group."""

    group: int
    blocks: list[int]


@dataclass
class Known:
    """What the test knows about one block."""

    generation: int = 0
    refs: int = 0
    holds: int = 0
    content: bytes | None = None  # registered hash
    fence: int = 0


@dataclass
class Model:
    blocks: dict[tuple[int, int], Known] = field(default_factory=dict)

    def of(self, group: int, block: int) -> Known:
        return self.blocks.setdefault((group, block), Known())


class BlockLife(RuleBasedStateMachine):
    """Random users of a small pool. The model says which blocks may be handed out and which must keep their content."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = manager(*SIZES)
        self.model = Model()
        self.owners: list[Owner] = []
        self.pins: list[tuple[int, int]] = []
        self.holds: list[tuple[int, int]] = []
        self.next_hash = 1
        self.step = 0
        self.retired = 0
        self.index: list[set[bytes]] = [set() for _ in SIZES]

    def known(self, group: int, block: int) -> Known:
        return self.model.of(group, block)

    def lose_reference(self, group: int, block: int) -> None:
        self.known(group, block).refs -= 1

    @rule(counts=st.tuples(st.integers(0, 4), st.integers(0, 2)), for_transfer=st.booleans())
    def reserve(self, counts: tuple[int, int], for_transfer: bool) -> None:
        usable = [0, 0]
        for group, size in enumerate(SIZES):
            for block in range(1, size + 1):
                known = self.known(group, block)
                fenced = for_transfer and known.fence > self.retired
                usable[group] += known.refs == 0 and known.holds == 0 and not fenced
        possible = all(count <= limit for count, limit in zip(counts, usable, strict=True))
        before = [self.manager.counts(group) for group in range(2)]
        assert self.manager.can_reserve(counts, for_transfer=for_transfer) is possible
        got = self.manager.reserve(counts, for_transfer=for_transfer)
        if not possible:
            assert got is None
            assert [self.manager.counts(group) for group in range(2)] == before, "all groups or none"
            return
        assert got is not None
        raises = {(r.group, r.block): r.generation for r in self.manager.drain_raises()}
        assert sorted(raises) == sorted((group, block) for group, blocks in enumerate(got) for block in blocks)
        for group, (count, blocks) in enumerate(zip(counts, got, strict=True)):
            assert len(blocks) == len(set(blocks)) == count
            for block in blocks:
                known = self.known(group, block)
                assert known.refs == 0 and known.holds == 0, "a pinned, held or owned block was handed out"
                assert not for_transfer or known.fence <= self.retired, "a fenced block became a destination"
                assert raises[group, block] > known.generation
                known.generation = raises[group, block]
                known.refs, known.content = 1, None
                assert self.manager.state(group, block) is BlockState.FILLING
            if blocks:
                self.owners.append(Owner(group, blocks))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), fenced=st.booleans())
    def release(self, data: st.DataObject, fenced: bool) -> None:
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        fence = 0
        if fenced:
            self.step += 1
            fence = self.step
        self.manager.release(owner.group, owner.blocks, fence=fence)
        for block in owner.blocks:
            known = self.known(owner.group, block)
            known.refs -= 1
            known.fence = max(known.fence, fence)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), repeat=st.booleans())
    def fill(self, data: st.DataObject, repeat: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        for block in owner.blocks:
            if self.manager.state(owner.group, block) is BlockState.FILLING:
                number = 1 if repeat else self.next_hash + 1
                self.next_hash = max(self.next_hash, number)
                taken = bool(self.manager.lookup(owner.group, [name(number)], 1))
                self.manager.mark_ready(owner.group, block, name(number))
                self.known(owner.group, block).content = None if taken else name(number)
                return

    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        group = data.draw(st.integers(0, 1))
        hashes = self.manager.registered_hashes(group)
        if hashes:
            wanted = data.draw(st.lists(st.sampled_from(hashes), min_size=1, max_size=3, unique=True))
            blocks = self.manager.lookup(group, wanted, 8)
            assert [self.known(group, block).content for block in blocks] == wanted, "a READY block was overwritten"
            self.manager.acquire(group, blocks)
            for block in blocks:
                self.known(group, block).refs += 1
                assert self.manager.state(group, block) is BlockState.READY
            self.owners.append(Owner(group, blocks))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        refs = [(owner.group, block) for block in owner.blocks]
        assert self.manager.pin(refs) == [self.known(*ref).generation for ref in refs]
        for ref in refs:
            self.known(*ref).refs += 1
        self.pins += refs

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), held=st.booleans())
    def unpin(self, data: st.DataObject, held: bool) -> None:
        ref = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        if held:
            self.manager.hold([ref])
            self.known(*ref).holds += 1
            self.holds.append(ref)
        self.manager.unpin([ref])
        self.known(*ref).refs -= 1

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        ref = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        self.manager.unhold([ref])
        self.known(*ref).holds -= 1

    @rule(ahead=st.integers(0, 2))
    def retire(self, ahead: int) -> None:
        self.retired = max(self.retired, self.step - ahead)
        self.manager.retire_fences(self.step - ahead)

    @rule()
    def clear(self) -> None:
        self.manager.clear_cache()
        for known in self.model.blocks.values():
            known.content = None

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity()
        for event in self.manager.drain_events():
            if event.kind is EventKind.STORED:
                self.index[event.group].add(event.hash)
            elif event.kind is EventKind.REMOVED:
                self.index[event.group].remove(event.hash)
            else:
                self.index[event.group].clear()
        for group, size in enumerate(SIZES):
            assert set(self.manager.registered_hashes(group)) == self.index[group], "an index fed by events went astray"
            for block in range(1, size + 1):
                known = self.known(group, block)
                state = self.manager.state(group, block)
                assert self.manager.num_references(group, block) == known.refs
                assert self.manager.is_held(group, block) is (known.holds > 0)
                assert self.manager.generation(group, block) == known.generation
                if known.refs == 0 and known.holds:
                    assert state is BlockState.QUARANTINED
                elif known.refs == 0:
                    assert state is (BlockState.CACHED if known.content else BlockState.FREE)
                else:
                    assert state in (BlockState.FILLING, BlockState.READY)

    def teardown(self) -> None:
        for owner in self.owners:
            self.manager.release(owner.group, owner.blocks)
        self.manager.unpin(self.pins)
        self.manager.unhold(self.holds)
        self.manager.clear_cache()
        self.manager.check_integrity()
        for group, size in enumerate(SIZES):
            assert self.manager.counts(group).free == size


TestBlockLife = BlockLife.TestCase
TestBlockLife.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def ready(blocks: BlockManager, numbers: list[int]) -> list[int]:
    """Reserves blocks of group 0, fills them with these hashes and returns them referenced."""
    got = blocks.reserve([len(numbers)] + [0] * (len(blocks.groups) - 1))
    assert got is not None
    for block, number in zip(got[0], numbers, strict=True):
        blocks.mark_ready(0, block, name(number))
    return got[0]


def test_evicts_the_oldest_release_first_and_tails_before_heads() -> None:
    blocks = manager(4)
    old, new = ready(blocks, [1, 2]), ready(blocks, [3, 4])
    blocks.release(0, old)
    blocks.release(0, new)
    blocks.drain_events()
    assert blocks.reserve([3]) is not None
    removed = [event.hash for event in blocks.drain_events()]
    assert removed == [name(2), name(1), name(4)]
    assert blocks.lookup(0, [name(3)], 1) == [new[0]]


def test_lookup_stops_at_the_first_gap_and_at_the_limit() -> None:
    blocks = manager(4)
    got = ready(blocks, [1, 2, 4])
    assert blocks.lookup(0, [name(1), name(2), name(3), name(4)], 9) == got[:2]
    assert blocks.lookup(0, [name(1), name(2)], 1) == got[:1]
    assert blocks.num_references(0, got[0]) == 1, "lookup takes no reference"


def test_second_block_with_the_same_content_is_not_registered_and_ends_free() -> None:
    blocks = manager(2)
    first, second = ready(blocks, [1]), ready(blocks, [1])
    blocks.release(0, second)
    assert blocks.state(0, second[0]) is BlockState.FREE
    blocks.release(0, first)
    assert blocks.state(0, first[0]) is BlockState.CACHED


def test_without_prefix_cache_nothing_is_found() -> None:
    blocks = manager(2, enable_prefix_cache=False)
    got = ready(blocks, [1])
    assert blocks.lookup(0, [name(1)], 1) == []
    blocks.release(0, got)
    assert blocks.counts(0).free == 2
    assert blocks.drain_events() == []


def test_fence_follows_a_block_through_a_reuse_by_compute() -> None:
    blocks = manager(1)
    got = blocks.reserve([1])
    assert got is not None
    blocks.release(0, got[0], fence=5)
    again = blocks.reserve([1])
    assert again is not None and again == got, "compute is ordered behind step 5 and needs not wait"
    blocks.release(0, again[0])  # never launched
    assert blocks.reserve([1], for_transfer=True) is None
    blocks.retire_fences(4)
    assert not blocks.can_reserve([1], for_transfer=True)
    blocks.retire_fences(5)
    assert blocks.reserve([1], for_transfer=True) == got


def test_fenced_cached_block_is_no_destination_either() -> None:
    blocks = manager(2)
    first, second = ready(blocks, [1]), ready(blocks, [2])
    blocks.release(0, first, fence=3)
    blocks.release(0, second)
    assert blocks.reserve([2], for_transfer=True) is None
    assert blocks.reserve([1], for_transfer=True) == [second]
    blocks.retire_fences(3)
    assert blocks.reserve([1], for_transfer=True) == [first]


def test_raises_of_a_transfer_match_the_drained_ones() -> None:
    blocks = manager(3)
    got = blocks.reserve([2], for_transfer=True)
    assert got is not None
    assert blocks.raises_of(0, got[0]) == blocks.drain_raises()
    assert blocks.drain_raises() == []


def test_capacity_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="self: 0 blocks"):
        GroupCapacity("self", 0, 4)
