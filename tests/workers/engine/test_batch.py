from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import RequestKey, SamplingParams
from tests.support.engines import BLOCK_SIZE, CPU, limits
from workers.engine.batch import StepBatch, build
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence
from workers.engine.sequence_mirror import SequenceMirror
from workers.engine.step_plan import PreviousRow, StepPlan, StepResult

GROUPS = 2


def sequences(seed: int, count: int) -> list[Sequence]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        tokens = [draw.randrange(50) for _ in range(draw.randint(1, 30))]
        params = SamplingParams(
            max_tokens=draw.randint(1, 20),
            temperature=draw.choice([0.0, 0.5]),
            seed=draw.getrandbits(64),
            sample=draw.randint(0, 3),
            top_k=i,
        )
        made.append(Sequence(i, RequestKey(f"request-{i}", 0), tokens, len(tokens), params, arrival=i))
    return made


def check(batch: StepBatch, plan: StepPlan, by_id: dict[int, Sequence]) -> None:
    """The batch against the scheduler's own sequences, token by token."""
    attention = batch.attention
    rows = sorted(plan.sequences, key=lambda row: row.num_tokens != 1)  # stable
    assert attention.num_sequences == len(rows)
    assert attention.num_decodes == sum(row.num_tokens == 1 for row in rows)
    assert attention.query_lens == [row.num_tokens for row in rows]
    assert attention.context_lens == [row.start + row.num_tokens for row in rows]
    assert attention.num_tokens == len(batch.input_ids) == len(attention.positions) == plan.num_tokens
    expected_previous: list[tuple[int, int]] = []
    t = 0
    for i, row in enumerate(rows):
        seq = by_id[row.id]
        assert attention.query_starts[i] == t
        for group, metadata in enumerate(attention.groups):
            num_blocks = -(-(row.start + row.num_tokens) // BLOCK_SIZE)
            listed = metadata.block_table[i].tolist()
            assert listed[:num_blocks] == seq.block_tables[group][:num_blocks]
        if isinstance(row.inputs, PreviousRow):
            expected_previous.append((t, row.inputs.row))
        for position in range(row.start, row.start + row.num_tokens):
            assert int(attention.positions[t]) == position
            if not isinstance(row.inputs, PreviousRow):
                assert int(batch.input_ids[t]) == seq.tokens[position]
            for group, metadata in enumerate(attention.groups):
                block = seq.block_tables[group][position // BLOCK_SIZE]
                assert int(metadata.slot_mapping[t]) == block * BLOCK_SIZE + position % BLOCK_SIZE
            t += 1
    assert attention.query_starts[-1] == t
    assert list(zip(batch.previous_tokens.tolist(), batch.previous_rows.tolist(), strict=True)) == expected_previous
    sampled = [(i, row) for i, row in enumerate(rows) if row.sample]
    assert batch.sampled_ids == [row.id for _, row in sampled]
    assert [plan.sequences[i].id for i in batch.sampled_rows.tolist()] == batch.sampled_ids
    assert attention.logits_rows.tolist() == [attention.query_starts[i + 1] - 1 for i, _ in sampled]
    assert attention.only_logits, "nobody reads prompts here"
    assert (attention.rows_read() is None) == (attention.num_decodes == len(rows))
    assert batch.draws.position.tolist() == [row.start + row.num_tokens for _, row in sampled]
    for values, expected in [
        (batch.draws.seed, [by_id[row.id].params.seed for _, row in sampled]),
        (batch.draws.top_k, [by_id[row.id].params.top_k for _, row in sampled]),
        (batch.draws.temperature, [by_id[row.id].params.temperature for _, row in sampled]),
        (batch.draws.sample, [by_id[row.id].params.sample for _, row in sampled]),
    ]:
        assert values.tolist() == expected


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 70),
    num_blocks=st.integers(14, 200),
    chunk_tokens=st.integers(1, 30),
    in_flight=st.integers(1, 2),
)
def test_batches_say_what_the_scheduler_meant(
    seed: int, count: int, num_blocks: int, chunk_tokens: int, in_flight: int
) -> None:
    blocks = BlockManager([GroupCapacity(f"group-{i}", num_blocks, BLOCK_SIZE) for i in range(GROUPS)])
    scheduler = Scheduler(
        blocks, limits(max_batched_tokens=90, max_sequences=80, chunk_tokens=chunk_tokens), b"root" * 4
    )
    mirror = SequenceMirror([BLOCK_SIZE] * GROUPS, frozenset())
    by_id = {seq.id: seq for seq in sequences(seed, count)}
    for seq in by_id.values():
        scheduler.add(seq)
    draw = random.Random(seed)
    unsettled: list[StepPlan] = []
    while scheduler.has_work or unsettled:
        if scheduler.has_work:
            plan = scheduler.schedule()
            mirror.apply(plan)
            if plan.sequences:
                check(build(plan, mirror, CPU), plan, by_id)
            unsettled.append(plan)
        if len(unsettled) == in_flight or not scheduler.has_work:
            oldest = unsettled.pop(0)
            tokens = {row.id: draw.randrange(50) for row in oldest.sequences if row.sample}
            scheduler.settle(oldest, StepResult(tokens=tokens))
    mirror.apply(scheduler.schedule())
    assert len(mirror) == 0
    for table in mirror.tables:
        assert not table.rows.any() and not table.lengths.any()


def test_a_batch_of_decodes_has_no_padding_beyond_its_longest_context() -> None:
    blocks = BlockManager([GroupCapacity("self", 64, BLOCK_SIZE)])
    scheduler = Scheduler(blocks, limits(), b"root" * 4)
    mirror = SequenceMirror([BLOCK_SIZE], frozenset())
    for i, length in enumerate([3, 17]):
        scheduler.add(Sequence(i, RequestKey(str(i), 0), [1] * length, length, SamplingParams(max_tokens=5), arrival=i))
    plan = scheduler.schedule()
    mirror.apply(plan)
    batch = build(plan, mirror, CPU)
    table = batch.attention.groups[0].block_table
    assert table.shape == (2, 5)
    assert table[0, 1:].tolist() == [0] * 4  # null blocks
    assert batch.attention.groups[0].slot_mapping.dtype == torch.int64


def test_who_reads_a_prompt_gets_all_its_hidden_states() -> None:
    blocks = BlockManager([GroupCapacity("self", 64, BLOCK_SIZE)])
    scheduler = Scheduler(blocks, limits(), b"root" * 4)
    mirror = SequenceMirror([BLOCK_SIZE], frozenset())
    seen: list[bool] = []
    for i, num_prompt_logprobs in enumerate([None, 2]):
        params = SamplingParams(max_tokens=5, num_prompt_logprobs=num_prompt_logprobs)
        scheduler.add(Sequence(i, RequestKey(str(i), 0), [1] * 9, 9, params, arrival=i))
        plan = scheduler.schedule()
        mirror.apply(plan)
        seen.append(build(plan, mirror, CPU).attention.rows_read() is None)
        scheduler.settle(plan, StepResult(tokens={row.id: 1 for row in plan.sequences if row.sample}))
    assert seen == [False, True]
