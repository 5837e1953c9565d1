"""The block tables of sequences over the block manager: admission, growth, victims, what a pull brought.

Groups either grow with a sequence's tokens (all with one block size; hashed, shared) or hold a fixed extent of it
(`Sequence.extents`): the output of its encoder, which sequences with equal input share, or what is its own alone.
Engine thread only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from cluster.hashing import encoder_hashes
from workers.engine.block_manager import BlockManager, BlockState
from workers.engine.sequence import Sequence, SequenceStatus

_SPARE_SHARE = 50  # an admission leaves up to 1/50 of a group to the growth of those that run


class BlockTables:
    def __init__(self, blocks: BlockManager, chain_root: bytes) -> None:
        self._blocks = blocks
        self._chain_root = chain_root
        self._groups = blocks.groups
        self._indexes = range(len(self._groups))
        self.block_size = self._groups[0].block_size  # of every growing group

    # ------------------------------------------------------------------ taking blocks

    def admit(self, seq: Sequence, *, num_running: int) -> bool:
        """Blocks for all known input, cached ones first. False and nothing changed if there is no room.

        The last known token is always computed, for its logits: the hit ends before its block. Where every prompt
        position must be computed, nothing is looked up.
        """
        spare = [
            min(num_running, group.num_blocks // _SPARE_SHARE) if seq.grows(index) else 0
            for index, group in enumerate(self._groups)
        ]
        max_hit_blocks = 0 if seq.params.needs_whole_prompt else (len(seq.tokens) - 1) // self.block_size
        return self.occupy(seq, max_hit_blocks, spare=spare, for_transfer=False)

    def occupy(self, seq: Sequence, max_hit_blocks: int, *, spare: SequenceOf[int], for_transfer: bool) -> bool:
        """Gives an empty sequence cached and reserved blocks for all its tokens; `spare` blocks must be left over.

        It may hold the output of its encoder already. One whose output is neither held nor cached gets nothing.
        """
        kept = seq.block_tables or [[] for _ in self._indexes]
        assert not any(table for index, table in enumerate(kept) if seq.grows(index)), f"{seq} has blocks"
        num_tokens = len(seq.tokens)
        if self._blocks.enable_prefix_cache:
            seq.extend_hashes(self._chain_root, num_tokens // self.block_size, self.block_size)
        hits = self._hits(seq, max_hit_blocks)
        needed = [
            total - len(hit) - len(own)
            for total, hit, own in zip(self.totals(seq, num_tokens), hits, kept, strict=True)
        ]
        if seq.encoder_input is not None and any(needed[index] for index in self._indexes if not seq.grows(index)):
            return False
        for index in self._indexes:  # before touching the hits' age
            if needed[index] + spare[index] > self._blocks.num_available(index):
                return False
        for index, hit in enumerate(hits):
            self._blocks.acquire(index, hit)
        got = None
        if all(needed[index] + spare[index] <= self._blocks.num_available(index) for index in self._indexes):
            got = self._blocks.reserve(needed, for_transfer=for_transfer)
        if got is None:
            for index, hit in enumerate(hits):
                self._blocks.release(index, hit)
            return False
        seq.block_tables = [own + hit + fresh for own, hit, fresh in zip(kept, hits, got, strict=True)]
        seq.num_ready_blocks = max(len(hit) for index, hit in enumerate(hits) if seq.grows(index))
        seq.num_computed = seq.num_confirmed = seq.num_ready_blocks * self.block_size
        seq.num_known = num_tokens
        if seq.num_preemptions == 0:
            seq.prefix_hit_tokens = seq.num_computed
        self._measure(seq)
        return True

    def occupy_output(self, seq: Sequence, *, for_transfer: bool = False) -> bool:
        """Blocks for the output of its encoder and nothing else. False and nothing changed if there is no room."""
        assert not any(seq.block_tables), f"{seq} has blocks"
        totals = self.totals(seq, 0)
        counts = [0 if seq.grows(index) else totals[index] for index in self._indexes]
        got = self._blocks.reserve(counts, for_transfer=for_transfer)
        if got is None:
            return False
        seq.block_tables = got
        return True

    def take_cached_output(self, seq: Sequence) -> None:
        """`has_cached_output` said that it is there."""
        seq.block_tables = self._hits(seq, 0)
        for index, hit in enumerate(seq.block_tables):
            self._blocks.acquire(index, hit)

    def has_cached_output(self, seq: Sequence) -> bool:
        hits = self._hits(seq, 0)
        return all(hits[index] for index in self._indexes if not seq.grows(index))

    def grow(self, seq: Sequence, end: int) -> bool:
        """Room for the first `end` tokens. False and nothing changed if blocks are short."""
        got = self._blocks.reserve(self.missing(seq, end))
        if got is None:
            return False
        if seq.fresh is None:
            seq.fresh = [[] for _ in self._indexes]
        for table, fresh, blocks in zip(seq.block_tables, seq.fresh, got, strict=True):
            table += blocks
            fresh += blocks
        self._measure(seq)
        return True

    def fork(self, source: Sequence, seq: Sequence) -> list[tuple[int, int, int]]:
        """Gives a sequence without blocks those of all that `source` has confirmed, which it begins with, too. There is
        room for one more block in each growing group.

        A partial last block is not shared: (group, block, new block) says what is to be copied before it is written.
        """
        assert not any(seq.block_tables) and source.num_confirmed <= len(seq.tokens), f"{seq} from {source}"
        full, rest = divmod(source.num_confirmed, self.block_size)
        fresh = self._blocks.reserve([int(bool(rest) and seq.grows(index)) for index in self._indexes])
        assert fresh is not None, f"{seq} finds no room for its fork"
        copies: list[tuple[int, int, int]] = []
        tables: list[list[int]] = []
        for group, (table, new) in enumerate(zip(source.block_tables, fresh, strict=True)):
            shared = table[:full] if seq.grows(group) else table
            self._blocks.acquire(group, shared)
            copies += [(group, table[full], block) for block in new]
            tables.append(shared + new)
        seq.block_tables = tables
        seq.num_ready_blocks = full
        seq.num_computed = seq.num_confirmed = source.num_confirmed
        self._measure(seq)
        return copies

    def victims(self, needed: SequenceOf[int], candidates: Iterable[Sequence]) -> list[Sequence] | None:
        """Whom to preempt, first candidates first, so that `needed` blocks of each group are to be had; None if all of
        them do not suffice.

        Blocks that others reference or that are held free nothing; a candidate that frees nothing is spared.
        """
        lacking = [count - self._blocks.num_available(index) for index, count in enumerate(needed)]
        users: defaultdict[tuple[int, int], list[Sequence]] = defaultdict(list)
        useful: set[int] = set()
        chosen: list[Sequence] = []
        for candidate in candidates:
            chosen.append(candidate)
            tables = (pair for each in (candidate, *candidate.beams) for pair in enumerate(each.block_tables))
            for index, table in tables:
                for block in table:
                    sharing = users[index, block]
                    sharing.append(candidate)
                    free = len(sharing) == self._blocks.num_references(index, block)
                    if free and not self._blocks.is_held(index, block):
                        lacking[index] -= 1
                        useful.update(user.id for user in sharing)
            if max(lacking) <= 0:
                return [victim for victim in chosen if victim.id in useful]
        return None

    # ------------------------------------------------------------------ what blocks hold

    def confirm(self, seq: Sequence, confirmed: int) -> None:
        """A step wrote the KV of its first `confirmed` tokens."""
        seq.num_confirmed = confirmed
        if confirmed >= (seq.num_ready_blocks + 1) * self.block_size:
            self.fill(seq, confirmed)

    def fill(self, seq: Sequence, confirmed: int) -> None:
        """Blocks that the first `confirmed` tokens fill become READY under their hashes."""
        full = confirmed // self.block_size
        hashed = self._blocks.enable_prefix_cache
        if hashed:
            seq.extend_hashes(self._chain_root, full, self.block_size)
        for group, table in enumerate(seq.block_tables):
            if seq.grows(group):
                for index in range(seq.num_ready_blocks, full):
                    self._blocks.mark_ready(group, table[index], seq.hashes[index] if hashed else None)
        seq.num_ready_blocks = full

    def fill_output(self, seq: Sequence) -> None:
        """The output of its encoder is written: it is found from now on, the partial last block, too."""
        assert seq.encoder_input is not None
        for group, table in enumerate(seq.block_tables):
            if not seq.grows(group):
                for block, hash_ in zip(table, encoder_hashes(seq.encoder_input.root, len(table)), strict=True):
                    self._blocks.mark_ready(group, block, hash_)

    def keep(self, seq: Sequence, num_valid: int) -> None:
        """A pull ended with the KV of the first `num_valid` tokens here: keeps their blocks and gives back the rest.

        At least the last known token is left to compute. What would be written next must be ours alone: a shared
        block, or one that a read may still write into, is given back too.
        """
        size = self.block_size
        valid = min(max(num_valid, seq.num_ready_blocks * size), len(seq.tokens) - 1)
        growing = [index for index in self._indexes if seq.grows(index)]
        for position in range(min(seq.num_ready_blocks, valid // size), -(-valid // size)):
            if not all(self._is_private(index, seq.block_tables[index][position]) for index in growing):
                valid = position * size
                break
        kept = -(-valid // size)
        for index in growing:
            table = seq.block_tables[index]
            self._blocks.release(index, table[kept:])
            del table[kept:]
        self.fill(seq, valid)
        seq.num_computed = seq.num_confirmed = valid
        self._measure(seq)

    def drop(self, seq: Sequence) -> None:
        """Gives all its blocks back, fenced by the last step that may touch them."""
        for index, table in enumerate(seq.block_tables):
            self._blocks.release(index, table, fence=seq.last_step)
        seq.block_tables = []
        seq.fresh = None
        seq.num_computed = seq.num_confirmed = seq.num_ready_blocks = seq.capacity = 0

    # ------------------------------------------------------------------ counting

    def _hits(self, seq: Sequence, max_blocks: int) -> list[list[int]]:
        """Per group, the cached blocks: of the longest prefix that all growing groups have, and of the encoder's
        output where all of it is there and the sequence does not hold it already."""
        hits: list[list[int]] = [[] for _ in self._indexes]
        if self._blocks.enable_prefix_cache:
            growing = [index for index in self._indexes if seq.grows(index)]
            for index in growing:
                hits[index] = self._blocks.lookup(index, seq.hashes, max_blocks)
                max_blocks = len(hits[index])
            for index in growing:
                del hits[index][max_blocks:]
            if seq.encoder_input is not None and not seq.block_tables:
                totals = self.totals(seq, 0)
                fixed = [index for index in self._indexes if not seq.grows(index)]
                found = {
                    index: self._blocks.lookup(
                        index, encoder_hashes(seq.encoder_input.root, totals[index]), totals[index]
                    )
                    for index in fixed
                }
                if all(len(found[index]) == totals[index] for index in fixed):
                    for index in fixed:
                        hits[index] = found[index]
        return hits

    def totals(self, seq: Sequence, end: int) -> list[int]:
        """Blocks per group for the first `end` tokens and all fixed extents."""
        extents = seq.extents or (None,) * len(self._groups)
        return [
            -(-(end if extent is None else extent) // group.block_size)
            for extent, group in zip(extents, self._groups, strict=True)
        ]

    def missing(self, seq: Sequence, end: int) -> list[int]:
        """Blocks per group that room for the first `end` tokens lacks."""
        pairs = zip(self.totals(seq, end), seq.block_tables, strict=True)
        return [max(0, total - len(table)) for total, table in pairs]

    def _measure(self, seq: Sequence) -> None:
        lengths = (len(table) for index, table in enumerate(seq.block_tables) if seq.grows(index))
        seq.capacity = min(lengths) * self.block_size

    def _is_private(self, group: int, block: int) -> bool:
        blocks = self._blocks
        return (
            blocks.state(group, block) is BlockState.FILLING
            and blocks.num_references(group, block) == 1
            and not blocks.is_held(group, block)
        )

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that the tables of all sequences that have blocks fit the block manager. For tests."""
        mentions: Counter[tuple[int, int]] = Counter()
        for seq in sequences:
            for group, table in enumerate(seq.block_tables):
                mentions.update((group, block) for block in table)
                for position, block in enumerate(table):
                    output = seq.encoder_input is not None and seq.status is not SequenceStatus.ENCODING
                    ready = position < seq.num_ready_blocks if seq.grows(group) else output
                    state = BlockState.READY if ready else BlockState.FILLING
                    assert self._blocks.state(group, block) is state, f"{seq}: block {position} of group {group}"
        for (group, block), count in mentions.items():
            assert self._blocks.num_references(group, block) >= count, f"block {block} of group {group} is short"
