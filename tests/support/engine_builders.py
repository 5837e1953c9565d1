"""Sequences and schedulers for tests, and a rank without a model: it follows plans as deltas over block memory."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import count

from cluster.hashing import chain_root
from cluster.request import RequestKey, SamplingParams
from workers.engine.block_manager import BlockManager, BlockState, GroupCapacity
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import EncoderInput, Sequence
from workers.engine.step_plan import Literal, ScheduledSequence, StepOutcome, StepPlan, StepResult
from workers.speculative.proposer import Proposer

ROOT = chain_root(b"engine tests")
EOS = 0
VOCABULARY = 50


def encoder_input(tokens: tuple[int, ...]) -> EncoderInput:
    return EncoderInput(tokens, chain_root(b"engine tests", encoder_tokens=tokens))


def history(previous: int, token: int) -> int:
    """What the KV of a position stands for: everything up to it."""
    return (previous * 1_000_003 + token + 1) % (1 << 61)


def next_token(state: int) -> int:
    """The token that the test's model draws after a history; EOS is rare."""
    return (state >> 7) % VOCABULARY


def histories(tokens: Iterable[int]) -> list[int]:
    states, state = [], 0
    for token in tokens:
        state = history(state, token)
        states.append(state)
    return states


def expected_tokens(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """What a request must emit, however it is scheduled, counted from its prompt."""
    tokens = list(prompt)
    state = histories(tokens)[-1]
    while True:
        token = next_token(state)
        tokens.append(token)
        state = history(state, token)
        emitted = len(tokens) - len(prompt)
        ends = token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
        if (ends and emitted >= params.min_tokens) or emitted >= params.max_tokens or len(tokens) >= max_model_len:
            return tokens[len(prompt) :]


class Foresight:
    """A proposer that knows what the test's model draws; every `wrong_every`-th position it guesses something else."""

    def __init__(self, wrong_every: int) -> None:
        self.wrong_every = wrong_every
        self.num_right = self.num_wrong = 0
        self.known: set[int] = set()

    def propose(self, id_: int, tokens: SequenceOf[int], max_tokens: int) -> tuple[int, ...]:
        assert max_tokens >= 1
        self.known.add(id_)
        state, drafts = histories(tokens)[-1], []
        for position in range(len(tokens), len(tokens) + min(max_tokens, 5)):
            token = next_token(state)
            drafts.append(token if position % self.wrong_every else (token + 1) % VOCABULARY)
            state = history(state, drafts[-1])
        return tuple(drafts)

    def judged(self, id_: int, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        assert id_ in self.known and 0 <= num_accepted <= num_drafts and num_tokens
        self.num_right += num_accepted
        self.num_wrong += num_drafts - num_accepted

    def forget(self, id_: int) -> None:
        self.known.discard(id_)


class RankDouble:
    """Block memory and the mirror of one rank. Asserts that plans are deltas it can follow, that no READY or CACHED
    block is written, and that every position it attends to holds exactly its history."""

    def __init__(self, blocks: BlockManager, *, group: int = 0, late: bool = False) -> None:
        self.blocks = blocks
        self.late = late  # plans run some time after they were made
        self.group = group
        self.block_size = blocks.groups[group].block_size
        self.memory: dict[int, list[int]] = {}
        self.outputs: dict[int, tuple[int, ...]] = {}  # block of the fixed group -> the encoder input it was made of
        self.inputs: dict[int, tuple[int, ...]] = {}  # sequence -> its encoder input, as the test gave it
        self.projected: dict[int, tuple[int, ...]] = {}  # the same, where decoders read what a step makes of it
        self.num_projected = 0
        self.num_encoded = 0
        self.tables: dict[int, list[list[int]]] = {}
        self.known: set[int] = set()
        self.previous: list[int | None] = []
        self.runs: dict[int, tuple[int, ...]] = {}  # of the last plan: what rows with drafts drew
        self.num_rows = 0
        self.step = 0

    def run(self, plan: StepPlan) -> dict[int, int]:
        """Computes the plan; returns the sampled tokens of rows without drafts."""
        assert plan.step == self.step + 1
        self.step = plan.step
        for id_ in plan.finished:
            self.known.remove(id_)
            self.tables.pop(id_, None)
        for id_ in plan.preempted:
            del self.tables[id_]
        for new in plan.new:
            assert new.id not in self.known
            self.known.add(new.id)
            self.tables[new.id] = [list(table) for table in new.block_tables]
        for resumed in plan.resumed:
            assert resumed.id in self.known and resumed.id not in self.tables
            self.tables[resumed.id] = [list(table) for table in resumed.block_tables]
        for encode in plan.encodes:
            self.num_encoded += 1
            assert encode.tokens == self.inputs[encode.id] and encode.group == 1
            assert len(encode.blocks) == -(-len(encode.tokens) // self.blocks.groups[1].block_size)
            for block in encode.blocks:
                found = self.blocks.state(1, block)
                assert found is BlockState.FILLING or (self.late and found is BlockState.FREE)
                self.outputs[block] = encode.tokens
        assert len(set(plan.projections)) == len(plan.projections)
        for group, block, num_tokens in plan.projections:
            assert group == 1 and 1 <= num_tokens <= self.blocks.groups[1].block_size
            self.num_projected += 1
            self.projected[block] = self.outputs[block]
        assert len({row.id for row in plan.sequences}) == len(plan.sequences)
        assert plan.num_tokens == sum(row.num_tokens for row in plan.sequences)
        assert plan.num_drafts == sum(row.num_drafts for row in plan.sequences)
        sampled: dict[int, int] = {}
        self.runs = {}
        outputs: list[int | None] = []
        for row in plan.sequences:
            self.num_rows += 1
            states = self._compute(row)
            outputs.append(None if row.num_drafts else next_token(states[-1]))
            if row.num_drafts:
                assert row.sample and row.num_drafts < row.num_tokens
                self.runs[row.id] = tuple(map(next_token, states[-1 - row.num_drafts :]))
            elif row.sample:
                sampled[row.id] = next_token(states[-1])
        self.previous = outputs
        return sampled

    def _compute(self, row: ScheduledSequence) -> list[int]:
        tables = self.tables[row.id]
        for table, blocks in zip(tables, row.appends, strict=False):
            table.extend(blocks)
        if isinstance(row.inputs, Literal):
            tokens = row.inputs.tokens
        else:
            token = self.previous[row.inputs.row]
            assert token is not None
            tokens = (token,)
        assert len(tokens) == row.num_tokens >= 1
        if row.id in self.inputs:
            read = self.projected if self.blocks.groups[1].is_projected else self.outputs
            assert tables[1] and all(read[block] == self.inputs[row.id] for block in tables[1])
        table = tables[self.group]
        states = [self.at(table, row.start - 1) if row.start else 0]
        for position, token in enumerate(tokens, row.start):
            states.append(history(states[-1], token))
            self.write(table[position // self.block_size], position % self.block_size, states[-1])
        return states[1:]

    def at(self, table: list[int], position: int) -> int:
        return self.memory[table[position // self.block_size]][position % self.block_size]

    def write(self, block: int, slot: int, state: int) -> None:
        # Late, the owner may be gone and the block FREE, but it must not hold what others use or may find.
        found = self.blocks.state(self.group, block)
        assert found is BlockState.FILLING or (self.late and found in (BlockState.FREE, BlockState.QUARANTINED))
        self.memory.setdefault(block, [-1] * self.block_size)[slot] = state

    def receive(self, blocks: Iterable[int], first_block: int, tokens: list[int]) -> None:
        """A transfer brings the KV of `tokens` into the blocks from position `first_block` on."""
        states = histories(tokens)
        for index, block in enumerate(blocks, first_block):
            for slot, state in enumerate(states[index * self.block_size : (index + 1) * self.block_size]):
                self.write(block, slot, state)

    def check(self, table: list[int], tokens: list[int]) -> None:
        """The blocks hold the KV of these tokens."""
        assert [self.at(table, position) for position in range(len(tokens))] == histories(tokens)


class EngineDouble:
    """Scheduler, block manager and rank, stepped by hand or with one step of overlap."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        max_batched_tokens: int = 16,
        max_sequences: int = 4,
        max_model_len: int = 64,
        prefill_reserve: float = 0.25,
        chunk_tokens: int = 8,
        enable_prefix_cache: bool = True,
        extra_groups: tuple[GroupCapacity, ...] = (),
        max_encoder_tokens: int = 0,
        late: bool = False,
        proposer: Proposer | None = None,
    ) -> None:
        groups = [GroupCapacity("self", num_blocks, block_size), *extra_groups]
        self.blocks = BlockManager(groups, enable_prefix_cache=enable_prefix_cache)
        self.limits = SchedulerLimits(
            max_batched_tokens=max_batched_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            prefill_reserve=prefill_reserve,
            chunk_tokens=chunk_tokens,
            max_encoder_tokens=max_encoder_tokens,
        )
        self.scheduler = Scheduler(self.blocks, self.limits, ROOT, eos_token_ids=frozenset({EOS}), proposer=proposer)
        self.rank = RankDouble(self.blocks, late=late)
        self.emitted: dict[int, list[int]] = {}
        self.in_flight: StepPlan | None = None
        self.sequences: dict[int, Sequence] = {}
        self._ids = count(1)

    def sequence(
        self,
        tokens: list[int],
        *,
        num_prompt: int | None = None,
        priority: int = 0,
        stop_after_first: bool = False,
        extents: tuple[int | None, ...] = (),
        encoder_tokens: tuple[int, ...] = (),
        params: SamplingParams | None = None,
        only_encodes: bool = False,
    ) -> Sequence:
        id_ = next(self._ids)
        self.sequences[id_] = seq = Sequence(
            id_,
            RequestKey(f"r{id_}", 0),
            list(tokens),
            len(tokens) if num_prompt is None else num_prompt,
            params or SamplingParams(max_tokens=8, ignore_eos=True),
            arrival=id_,
            priority=priority,
            stop_after_first=stop_after_first,
            extents=extents,
            encoder_input=encoder_input(encoder_tokens) if encoder_tokens else None,
            only_encodes=only_encodes,
        )
        if encoder_tokens:
            self.rank.inputs[id_] = encoder_tokens
        return seq

    def step(self) -> tuple[StepPlan, StepOutcome]:
        """schedule, compute, settle."""
        plan = self.scheduler.schedule()
        return plan, self.settle(plan)

    def step_overlapped(self) -> StepOutcome | None:
        """Makes the next plan, and only then computes and settles the one before: the device is that far behind."""
        before, self.in_flight = self.in_flight, self.scheduler.schedule()
        return None if before is None else self.settle(before)

    def land(self) -> StepOutcome | None:
        """Computes and settles the plan in flight."""
        before, self.in_flight = self.in_flight, None
        return None if before is None else self.settle(before)

    def run(self, max_steps: int = 500) -> list[StepOutcome]:
        """Steps until nothing is left to do."""
        outcomes = []
        while self.scheduler.has_work:
            outcomes.append(self.step()[1])
            self.scheduler.check_integrity()
            assert len(outcomes) < max_steps, "no end in sight"
        return outcomes

    def check_empty(self) -> None:
        """Nothing is left over: after the cache is cleared, every block is FREE."""
        self.scheduler.check_integrity()
        self.scheduler.schedule()  # lets finished sources go
        for group, capacity in enumerate(self.blocks.groups):
            counts = self.blocks.counts(group)
            assert counts.free + counts.cached == capacity.num_blocks, counts
        self.blocks.clear_cache()
        self.blocks.check_integrity()
        for group, capacity in enumerate(self.blocks.groups):
            assert self.blocks.counts(group).free == capacity.num_blocks

    def settle(self, plan: StepPlan) -> StepOutcome:
        """Computes a plan, checks what its rows attend to, and settles it."""
        sampled = self.rank.run(plan)
        for row in plan.sequences:
            seq = self.sequences[row.id]
            if not seq.is_finished:
                known = [*seq.tokens, *row.drafts][: row.start + row.num_tokens]
                self.rank.check(self.rank.tables[row.id][0], known)
        outcome = self.scheduler.settle(plan, StepResult(tokens=sampled, runs=self.rank.runs))
        for seq, token, index, *_ in outcome.tokens:
            assert token == seq.tokens[seq.num_prompt + index]
            self.emitted.setdefault(seq.id, []).append(token)
        last = {seq.id: (index, seq.num_emitted - 1) for seq, _, index, *_ in outcome.tokens}
        assert all(index == expected for index, expected in last.values())
        return outcome
