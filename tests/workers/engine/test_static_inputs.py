"""Steps of encoder–decoder models from the inputs of a graph, padded, without a graph: the tokens are those of the
ordinary path."""

from __future__ import annotations

import pytest
import torch

from cluster.request import SamplingParams
from tests.support.checkpoints import checkpoint
from tests.support.encoder_decoders import Text, texts
from tests.support.engines import LoadedEngine, limits
from tests.support.unreplayed import UnreplayedModel
from workers.attention.interface import AttentionBatch, FixedGroupMetadata, GroupMetadata
from workers.attention.packed import PackedBackend, TorchKernels
from workers.engine.engine import Engine
from workers.engine.model_runner import ModelRunner
from workers.engine.static_inputs import StaticInputs
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.loader import load

CPU = torch.device("cpu")
SIZES, PROMPT_SIZES = (1, 2, 4, 8), (15, 22, 30)  # steps of up to 40 tokens: the longest are not padded
LIMITS = limits(max_batched_tokens=40, max_sequences=8, max_model_len=64, chunk_tokens=8, max_encoder_tokens=80)


def serve(loaded: LoadedEngine, wanted: list[Text]) -> list[list[int]]:
    sequences = []
    for i, text in enumerate(wanted):
        params = SamplingParams(max_tokens=4 + i % 5, ignore_eos=True)
        sequences.append(loaded.sequence(text.prompt, params, encoder_tokens=text.source))
        loaded.scheduler.add(sequences[-1])
    loaded.run()
    loaded.scheduler.check_integrity()
    return [loaded.emitted(seq) for seq in sequences]


@pytest.mark.parametrize(
    "family", ["t5", "bart", *(pytest.param(name, marks=pytest.mark.full) for name in ("t5-gated", "mbart"))]
)
def test_tokens_are_those_of_the_ordinary_path(family: str) -> None:
    wanted = texts(family, 18)
    engines = [
        LoadedEngine(load(checkpoint(family)), num_blocks=60, block_size=4, scheduler_limits=LIMITS) for _ in range(2)
    ]
    plain, padded = engines
    model = padded.runner._model
    assert isinstance(model, EncoderDecoderModel)
    model.bind_kv(padded.runner._caches, backend=PackedBackend(model.attention_problem(4), TorchKernels()))
    for region in padded.pool.regions[0] + padded.pool.regions[1]:
        region[1:].view(torch.float32).fill_(torch.nan)  # what nobody wrote is not read
    inputs = StaticInputs(8, 16, CPU, [20], max_tokens=PROMPT_SIZES[-1])
    static = UnreplayedModel(model, inputs, SIZES, PROMPT_SIZES)
    runner = ModelRunner(static, padded.runner._caches, padded.pool.generations, [4, 4], device=CPU, encoder=model)
    padded.runner, padded.engine = runner, Engine(padded.scheduler, runner)
    tokens = serve(plain, wanted)
    assert serve(padded, wanted) == tokens
    assert {count < size for count, size in static.padded} == {True, False}
    assert {size for _, size in static.padded} >= {1, 4, 8}
    assert {size for _, size in static.padded_prompts} == set(PROMPT_SIZES), static.padded_prompts
    assert len({token for row in tokens for token in row}) > 20


def test_each_step_stands_where_the_one_before_stood_and_nothing_is_left_of_it() -> None:
    static = StaticInputs(4, 3, CPU, [5])

    def step(count: int, width: int, fixed_width: int) -> AttentionBatch:
        return AttentionBatch(
            num_sequences=count,
            num_decodes=count,
            query_lens=[1] * count,
            query_starts=list(range(count + 1)),
            context_lens=[7] * count,
            positions=torch.full((count,), 6),
            groups=(GroupMetadata(torch.full((count, width), 9), torch.full((count,), 38)),),
            logits_rows=torch.arange(count),
            fixed=(FixedGroupMetadata(torch.full((count, fixed_width), 8), list(range(2, 2 + count))),),
        )

    ids, batch = static.batch(4)
    (group,), (fixed,) = batch.groups, batch.fixed
    static.fill(torch.tensor([5, 6, 7, 8]), step(4, 3, 5), 4)
    assert ids.tolist() == [5, 6, 7, 8] and fixed.lens_on_device().tolist() == [2, 3, 4, 5]
    static.fill(torch.tensor([3, 4]), step(2, 2, 1), 4)
    assert ids.tolist() == [3, 4, 0, 0] and batch.positions.tolist() == [6, 6, 0, 0]
    assert group.slot_mapping.tolist() == [38, 38, 0, 0]
    assert fixed.lens_on_device().tolist() == [2, 3, 1, 1] and fixed.lens == [1, 1, 1, 1]
    assert group.block_table[:2, :2].eq(9).all() and group.block_table[2:].eq(0).all()
    assert fixed.block_table[:2, :1].eq(8).all() and fixed.block_table[2:].eq(0).all()
    static.fill(torch.tensor([1]), step(1, 1, 1), 2)
    assert ids.tolist() == [1, 0, 0, 0] and fixed.lens_on_device()[:2].tolist() == [2, 1]


def test_of_a_step_with_prompts_nothing_is_left_either() -> None:
    static = StaticInputs(3, 2, CPU, [4], max_tokens=8)

    def step(lens: list[int]) -> AttentionBatch:
        count, total = len(lens), sum(lens)
        return AttentionBatch(
            num_sequences=count,
            num_decodes=lens.count(1),
            query_lens=lens,
            query_starts=[sum(lens[:i]) for i in range(count + 1)],
            context_lens=[9] * count,
            positions=torch.full((total,), 6),
            groups=(GroupMetadata(torch.full((count, 2), 9), torch.full((total,), 38)),),
            logits_rows=torch.arange(count),
            fixed=(FixedGroupMetadata(torch.full((count, 1), 8), [2] * count),),
        )

    ids, batch = static.prompts_batch(8)
    assert batch.num_tokens == 8 and batch.num_sequences == 3 and batch.num_decodes == 0
    assert batch.spans is not None
    (group,), (fixed,) = batch.groups, batch.fixed
    static.fill_prompts(torch.arange(1, 8), step([1, 2, 4]), 8)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 0] and group.slot_mapping.tolist() == [38] * 7 + [0]
    assert batch.spans.tolist() == [[0, 1], [1, 2], [3, 4]]
    static.fill_prompts(torch.arange(1, 6), step([5]), 5)
    assert static.prompts_batch(5)[0].tolist() == [1, 2, 3, 4, 5]
    assert batch.spans.tolist() == [[0, 5], [0, 0], [0, 0]]
    assert fixed.lens_on_device().tolist() == [2, 1, 1]
    assert group.block_table.tolist() == [[9, 9], [0, 0], [0, 0]]
