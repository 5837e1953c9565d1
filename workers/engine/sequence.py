"""One token stream in an engine, and the order in which streams are served."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

from cluster.hashing import iter_block_hashes
from cluster.request import FinishReason, RequestKey, SamplingParams


class SequenceStatus(Enum):
    """Where a sequence stands; `Sequence.enter` allows only what is drawn.

             reserve_for_pull             pull_done
    WAITING ─────────────────> PULLING ─────────────> RUNNING
      │ ^ ^    release_pull       │                    │  │ ^
      │ │ └───────────────────────┤                    │  │ │
      │ └─────────────────────────│──── preempted ─────┘  │ │
      ├───────────────────────────│──── admitted ─────────│─┘
      └─────> FINISHED <──────────┴───────────────────────┘

    WAITING ── encoder input is read, here or elsewhere ──> ENCODING ── its output is here, or lost ──> WAITING
    """

    WAITING = "waiting"
    ENCODING = "encoding"
    PULLING = "pulling"
    RUNNING = "running"
    FINISHED = "finished"


_NEXT = {
    SequenceStatus.WAITING: {
        SequenceStatus.ENCODING,
        SequenceStatus.PULLING,
        SequenceStatus.RUNNING,
        SequenceStatus.FINISHED,
    },
    SequenceStatus.ENCODING: {SequenceStatus.WAITING, SequenceStatus.FINISHED},
    SequenceStatus.PULLING: {SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.FINISHED},
    SequenceStatus.RUNNING: {SequenceStatus.WAITING, SequenceStatus.FINISHED},
    SequenceStatus.FINISHED: set(),
}


class EncoderInput(NamedTuple):
    """What the encoder reads for a sequence. Sequences with equal roots share its output."""

    tokens: tuple[int, ...]
    root: bytes  # of the block hashes of every sequence with this input: covers it (cluster.hashing.chain_root)


class ForcedTokens(NamedTuple):
    """What stands at a place of the output whatever the model would have drawn; None: nothing."""

    second: int | None = None  # behind a prompt of one token
    last: int | None = None  # where the length ends the stream


NOTHING_FORCED = ForcedTokens()


class Sequence:
    """Tokens and block tables of one stream. Owned by the scheduler once added; stages read it, engine thread only.

    `tokens` is prompt + emitted + new and only grows. KV exists for the first `num_computed` of them, which counts
    steps in flight; `num_confirmed` counts settled ones only: confirmed <= computed, and only confirmed tokens are
    hashed, emitted or ticketed.
    """

    __slots__ = (
        "arrival",
        "beams",
        "block_tables",
        "capacity",
        "chain_root",
        "encoder_input",
        "extents",
        "finish",
        "forced",
        "forced_end",
        "fresh",
        "hashes",
        "id",
        "is_known_to_ranks",
        "is_queued",
        "is_table_sent",
        "is_unreported",
        "key",
        "last_step",
        "max_total_tokens",
        "needs_history",
        "num_computed",
        "num_confirmed",
        "num_known",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_ready_blocks",
        "num_rows",
        "only_encodes",
        "order",
        "params",
        "prefix_hit_tokens",
        "priority",
        "row",
        "status",
        "stop_after_first",
        "tokens",
    )

    def __init__(
        self,
        id: int,
        key: RequestKey,
        tokens: list[int],
        num_prompt: int,
        params: SamplingParams,
        *,
        arrival: int,
        priority: int = 0,
        hashes: Iterable[bytes] = (),
        chain_root: bytes | None = None,
        extents: tuple[int | None, ...] = (),
        encoder_input: EncoderInput | None = None,
        forced: ForcedTokens = NOTHING_FORCED,
        stop_after_first: bool = False,
        only_encodes: bool = False,
    ) -> None:
        """`id` is unique in the engine, `arrival` rises; larger `priority` comes first.

        tokens: prompt + emitted, taken over. hashes: of their full blocks, as far as they are known already.
        chain_root: of the block hashes, if it is not the scheduler's (salt, LoRA). With an encoder input it is that
        one's, which then covers salt and LoRA, too: two roots would let those share the output that may not.
        extents: per group, the fixed number of tokens it holds for this sequence, or None where it grows with
        `tokens`; () means that all groups grow, or with an encoder input that one more holds its output.
        stop_after_first: a source sequence; it ends with LENGTH after one sampled token, the handoff. (A pooled one
        ends with STOP after its prompt, on a source as elsewhere.)
        only_encodes: without tokens; it ends with STOP when the output of its encoder is in its blocks.
        """
        assert encoder_input is None or chain_root in (None, encoder_input.root), "two roots of one chain"
        assert encoder_input is not None or not only_encodes, "nothing to encode"
        self.id = id
        self.key = key
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.num_known = len(tokens)  # when it was last admitted: what is prefilled, not decoded
        self.params = params
        self.needs_history = params.needs_history
        self.arrival = arrival
        self.priority = priority
        self.order = (-priority, arrival, id)  # smaller is served first
        self.hashes = list(hashes)
        self.chain_root = chain_root if encoder_input is None else encoder_input.root
        self.encoder_input = encoder_input
        self.extents = extents or (() if encoder_input is None else (None, len(encoder_input.tokens)))
        self.forced = forced
        self.stop_after_first = stop_after_first
        self.only_encodes = only_encodes
        self.status = SequenceStatus.WAITING
        self.finish: FinishReason | None = None
        self.forced_end = 0  # where `forced.last` stands; set with the next
        self.max_total_tokens = 0  # LENGTH when `tokens` is that long; set when the scheduler accepts it
        self.num_computed = 0
        self.num_confirmed = 0
        self.num_pending = 0  # tokens sampled by steps that are not settled yet
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0  # at the first admission
        self.block_tables: list[list[int]] = []
        self.fresh: list[list[int]] | None = None  # blocks that the ranks have not been told of
        self.num_ready_blocks = 0  # leading blocks of the growing groups that are READY
        self.capacity = 0  # tokens that fit into the blocks of the growing groups
        self.last_step = 0  # the last step that may touch its blocks
        self.row = 0  # in the plan of that step
        self.is_queued = False
        self.is_unreported = False  # preempted by a plan that is not settled yet
        self.is_known_to_ranks = False
        self.is_table_sent = False
        searches = params.beams is not None and not stop_after_first
        self.num_rows = params.num_beams if searches else 1  # of a step, at most, when it decodes
        self.beams: list[Sequence] = []  # of its search: scheduled, preempted and ended with it (beams.py)

    @property
    def num_emitted(self) -> int:
        """Tokens after the prompt, over all attempts."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def enter(self, status: SequenceStatus) -> None:
        assert status in _NEXT[self.status], f"sequence {self.id}: {self.status.name} -> {status.name}"
        self.status = status

    def grows(self, group: int) -> bool:
        return not self.extents or self.extents[group] is None

    def output_blocks(self) -> tuple[int, tuple[int, ...]]:
        """The fixed group, and its blocks in it: of the output of its encoder."""
        ((group, blocks),) = [(group, table) for group, table in enumerate(self.block_tables) if not self.grows(group)]
        return group, tuple(blocks)

    def accept(self, token: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Appends a sampled token; says whether and why the stream ends with it.

        Before `min_tokens` only a grammar whose text is complete brings EOS: there is nothing after it.
        """
        self.tokens.append(token)
        params = self.params
        num_emitted = len(self.tokens) - self.num_prompt
        ends = token in eos_token_ids and not params.ignore_eos
        if num_emitted < params.min_tokens:
            stops = ends and params.grammar is not None
        else:
            stops = ends or token in params.stop_token_ids
        if stops:
            return FinishReason.STOP
        if self.stop_after_first or len(self.tokens) >= self.max_total_tokens:
            return FinishReason.LENGTH
        return None

    def extend_hashes(self, root: bytes, num_blocks: int, block_size: int) -> None:
        """Hashes up to the first `num_blocks` blocks, all of which are full of known tokens."""
        have = len(self.hashes)
        if have < num_blocks:
            tokens = self.tokens[have * block_size : num_blocks * block_size]
            previous = self.hashes[-1] if have else None
            self.hashes += iter_block_hashes(self.chain_root or root, tokens, block_size, previous)

    def check_integrity(self, *, is_running: bool, is_waiting: bool, is_pulling: bool) -> None:
        """Asserts that it is in the queues that its status names."""
        assert is_running == (self.status is SequenceStatus.RUNNING), f"{self}"
        assert is_waiting == self.is_queued, f"{self}"
        assert is_pulling == (self.status is SequenceStatus.PULLING), f"{self}"
        assert self.num_confirmed <= self.num_computed <= len(self.tokens) + self.num_pending, f"{self}"

    def __repr__(self) -> str:
        progress = f"{self.num_confirmed}/{self.num_computed}/{len(self.tokens)}"
        return f"Sequence({self.id}, {self.key.request_id}#{self.key.attempt}, {self.status.name}, {progress})"


class SequenceQueue:
    """Sequences in serving order: priority, then arrival."""

    __slots__ = ("_orders", "_sequences", "num_rows")

    def __init__(self) -> None:
        self._orders: list[tuple[int, int, int]] = []
        self._sequences: list[Sequence] = []
        self.num_rows = 0  # of all of them

    def insert(self, seq: Sequence) -> None:
        index = bisect_left(self._orders, seq.order)
        insort(self._orders, seq.order)
        self._sequences.insert(index, seq)
        self.num_rows += seq.num_rows

    def remove(self, seq: Sequence) -> None:
        index = bisect_left(self._orders, seq.order)
        assert index < len(self._sequences) and self._sequences[index] is seq, f"{seq} is not queued"
        del self._orders[index], self._sequences[index]
        self.num_rows -= seq.num_rows

    def head(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def first(self, num_rows: int) -> list[Sequence]:
        """A copy of the first ones that fit into so many rows, safe to walk while the queue changes."""
        if self.num_rows == len(self._sequences):
            return self._sequences[:num_rows]
        count = bisect_right(list(accumulate(seq.num_rows for seq in self._sequences)), num_rows)
        return self._sequences[:count]

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)
