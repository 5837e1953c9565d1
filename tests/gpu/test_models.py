"""Whole models on the GPU: fused against the plain layers on the same weights, graphs against eager, chunks, engine."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.request import RequestKey, SamplingParams
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from tests.support.gpu_workers import COMMON
from tests.support.gpu_workers import LITE as LITE_FIELDS
from tests.support.gpu_workers import QWEN as QWEN_FIELDS
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.cuda_graph import GraphedModel
from workers.engine.engine import Engine
from workers.engine.model_runner import ModelRunner
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import Sequence
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.grouped_query import GqaForCausalLM
from workers.models.loader import load

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BLOCK = 64
NUM_BLOCKS = 120
PLAIN_ROPE = {"rope_theta": 10000}
QWEN = {**COMMON, **PLAIN_ROPE, **QWEN_FIELDS, "architectures": ["Qwen3ForCausalLM"]}
LITE = {**COMMON, **PLAIN_ROPE, **LITE_FIELDS, "architectures": ["DeepseekV2ForCausalLM"]}
V3 = LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 192,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
}
QWEN2 = {key: value for key, value in QWEN.items() if key != "attention_bias"}
QWEN2["architectures"] = ["Qwen2ForCausalLM"]  # projections with biases, no norms of heads
QWEN_MOE = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
SHAPES = {"qwen": QWEN, "qwen2": QWEN2, "qwen-moe": QWEN_MOE, "lite": LITE, "v3": V3}
Model = GqaForCausalLM | DeepseekForCausalLM


class Rank:
    """A model with a pool of its own. `plain` and `rounded` compute with torch alone, on the same weights, in fp32 and
    in the model's own dtype."""

    def __init__(self, config: dict[str, object], folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
        self.model = cast(Model, load(folder, load_format="dummy", device=CUDA).model)
        self.plain = cast(Model, load(folder, load_format="dummy", device=CUDA, dtype="float32").model)
        weights = {name: copy.deepcopy(weight).float() for name, weight in self.model.state_dict().items()}
        self.plain.load_state_dict(weights, assign=True)
        self.pool, self.caches = self._pool(self.model)
        choice = self.model.bind_kv(self.caches, Environment.probe(CUDA, strict=True))
        assert choice.chosen == "hopper", choice
        self.rounded = cast(Model, load(folder, load_format="dummy", device=CUDA).model)
        for model in (self.plain, self.rounded):
            _, caches = self._pool(model)
            environment = Environment.probe(CUDA, disabled=["triton"])
            assert model.bind_kv(caches, environment).chosen == "reference"

    def _pool(self, model: Model):
        groups = model.kv_groups(BLOCK)
        pool = KvPool.allocate(KvGeometry(groups, model.spec.rope_convention), RankLayout(0, 0, 1), [NUM_BLOCKS], CUDA)
        return pool, [kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)]


@pytest.fixture(params=SHAPES)
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> Rank:
    return Rank(SHAPES[request.param], tmp_path)


def batch_of(rows: list[tuple[int, int, int]]) -> AttentionBatch:
    """(number of a sequence, cached tokens, new tokens); single tokens first. Sequence i owns blocks 9 i + 1 …"""
    query_lens = [new for _, _, new in rows]
    contexts = [cached + new for _, cached, new in rows]
    positions = torch.cat([torch.arange(cached, cached + new) for _, cached, new in rows])
    table = torch.tensor([[9 * number + 1 + i for i in range(9)] for number, _, _ in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(query_lens))
    slots = table[owner, positions // BLOCK] * BLOCK + positions % BLOCK
    starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
    return AttentionBatch(
        num_sequences=len(rows),
        num_decodes=sum(new == 1 for new in query_lens),
        query_lens=query_lens,
        query_starts=starts,
        context_lens=contexts,
        positions=positions.to(CUDA),
        groups=(GroupMetadata(table.to(CUDA), slots.to(CUDA)),),
        logits_rows=torch.tensor(starts[1:]).to(CUDA) - 1,
    )


STEPS = [
    [(0, 0, 130), (1, 0, 64), (2, 0, 3)],  # fresh prompts
    [(0, 130, 1), (2, 3, 1), (1, 64, 77), (3, 0, 200)],  # decodes beside a cached and a fresh prompt
    [(0, 131, 1), (1, 141, 1), (2, 4, 1), (3, 200, 1)],  # decodes alone
    [(3, 201, 300), (1, 142, 2)],  # a long chunk on a cached context
    [(0, 132, 1)],
]


def agreement(ours: Tensor, plain: Tensor) -> float:
    """Relative error of logits in the norm."""
    ours, plain = ours.float(), plain.float()
    return torch.nan_to_num((ours - plain).norm() / plain.norm(), nan=9.0).item()


@torch.inference_mode()
def test_logits_agree_with_fp32(rank: Rank) -> None:
    """bf16 sends a token to other experts at times: as far from fp32 as plain layers in bf16 are, and no farther."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (4, 600), device=CUDA)
    logits: list[list[Tensor]] = []
    for rows in STEPS:
        batch = batch_of(rows)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        logits.append([model.logits(model.forward(ids, batch)) for model in (rank.model, rank.rounded, rank.plain)])
        assert agreement(logits[-1][0], logits[-1][2]) < 0.5, rows
        assert rank.model.forward(ids, batch, (1,)).shape == (len(ids), 1024)
    ours, rounded, plain = (torch.cat(parts) for parts in zip(*logits, strict=True))
    assert agreement(ours, plain) < 1.3 * agreement(rounded, plain) + 0.01


@torch.inference_mode()
def test_rows_that_are_read_are_all_that_leaves_the_last_layer(rank: Rank) -> None:
    """And the cache is as if all did."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (4, 600), device=CUDA)
    pages = [pages.view(torch.uint8) for cache in rank.caches for pages in cache.regions.values()]
    for rows in STEPS:
        batch = batch_of(rows)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        whole, written = rank.model.forward(ids, batch), [each.clone() for each in pages]
        for read in (batch.logits_rows, batch.logits_rows[-1:], batch.logits_rows[:0]):
            asked = replace(batch, only_logits=True, logits_rows=read)
            hidden = rank.model.forward(ids, asked)
            if batch.num_decodes < batch.num_sequences:
                assert hidden.shape == (len(read), whole.shape[1])
                assert not len(read) or agreement(hidden, whole[read]) < 0.06
            else:
                assert torch.equal(hidden, whole)
            assert all(torch.equal(each, before) for each, before in zip(pages, written, strict=True))
            assert rank.model.forward(ids, asked, (1,)).shape == (len(ids), 1024)


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", [64, 4096, 6400, 151_937])
def test_the_first_of_the_largest_logits_wins(vocabulary: int) -> None:
    """Rows of a wider matrix; at the ends of parts, too, and beside NaN, infinities and nothing at all."""
    from workers.engine.sampler import Draws, find_largest, sample
    from workers.kernels.largest import largest

    logits = torch.randn(7, vocabulary + 3, device=CUDA).to(torch.bfloat16)[:, 1:-2]
    last = vocabulary - 1
    logits[1, [7, 40, last]] = 50.0
    logits[2, [3, last]] = float("nan")
    logits[3, last] = 60.0
    logits[4] = float("-inf")
    logits[5, 0] = float("inf")
    logits[6] = float("-inf")
    logits[6, 11] = -1e4
    for given in (logits, logits[1:2], logits.float()):
        (tokens, values, is_valid), want = largest(given), find_largest(given.cpu())
        assert torch.equal(is_valid.cpu(), want[2]) and tokens.dtype == torch.int64
        assert torch.equal(tokens.cpu()[want[2]], want[0][want[2]])
        assert torch.equal(values.cpu()[want[2]], want[1][want[2]])
    ones, zeros = np.ones(7, np.float32), np.zeros(7, np.int64)
    draws = Draws(
        np.linspace(0, 1.5, 7, dtype=np.float32), zeros, ones, 0 * ones, zeros.astype(np.uint64), zeros, zeros
    )
    ours, plain = sample(logits, draws, largest), sample(logits, draws)
    assert ours.is_valid.tolist() == plain.is_valid.tolist() == [True, True, False, True, False, False, True]
    assert torch.equal(ours.tokens[ours.is_valid], plain.tokens[ours.is_valid]) and ours.tokens[6] == 11


@torch.inference_mode()
def test_cached_context_in_pieces(tmp_path: Path) -> None:
    rank = Rank(LITE, tmp_path)
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (4, 600), device=CUDA)
    outs: list[Tensor] = []
    for piece in (4096, 100):
        assert isinstance(rank.model, DeepseekForCausalLM)
        rank.model.bind_kv(rank.caches, max_piece_tokens=piece)
        hidden: list[Tensor] = []
        for rows in STEPS[:4]:
            ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
            hidden.append(rank.model.forward(ids, batch_of(rows)))
        outs.append(hidden[-1])
    assert agreement(outs[1], outs[0]) < 0.06


@torch.inference_mode()
def test_graphs_return_what_eager_steps_return(rank: Rank) -> None:
    graphed = GraphedModel(rank.model, [1, 2, 4, 8], 9, CUDA)
    graphed.capture()
    for cache in rank.caches:
        for pages in cache.regions.values():
            pages.normal_(std=0.3)
    for count in (1, 2, 3, 4, 7):
        rows = [(number, 20 + 70 * number, 1) for number in range(count)]
        padded = next(size for size in (1, 2, 4, 8) if size >= count)
        ids = torch.randint(0, 1000, (count,), device=CUDA)
        hidden = graphed.forward(ids, batch_of(rows))
        logits = graphed.logits(hidden).clone()
        before = [pages.clone() for cache in rank.caches for pages in cache.regions.values()]
        eager = batch_of(rows)
        if padded > count:
            pad = padded - count
            (group,) = eager.groups
            table = torch.cat((group.block_table, torch.zeros(pad, 9, dtype=torch.int64, device=CUDA)))
            zeros = torch.zeros(pad, dtype=torch.int64, device=CUDA)
            eager = AttentionBatch(
                padded,
                padded,
                [1] * padded,
                list(range(padded + 1)),
                [1] * padded,
                torch.cat((eager.positions, zeros)),
                (GroupMetadata(table, torch.cat((group.slot_mapping, zeros))),),
                torch.arange(padded, device=CUDA),
            )
            ids = torch.cat((ids, zeros))
        want = rank.model.logits(rank.model.forward(ids, eager))
        assert torch.equal(logits, want[:count])
        after = [pages for cache in rank.caches for pages in cache.regions.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the same bytes were written"


def test_the_engine_serves_the_same_tokens_in_any_batch(rank: Rank) -> None:
    """Chunks, batches and graphs may round differently, tokens of clear margin must not care: most are equal."""
    from workers.kernels.largest import largest

    graphed = GraphedModel(rank.model, [1, 2, 4, 8], 32, CUDA)
    graphed.capture()
    torch.manual_seed(0)
    prompts = [torch.randint(0, 1000, (length,)).tolist() for length in (5, 64, 200, 333, 90)]

    def serve(indices: list[int], chunk: int) -> dict[int, list[int]]:
        blocks = BlockManager([GroupCapacity("self", NUM_BLOCKS, BLOCK)], enable_prefix_cache=False)
        limits = SchedulerLimits(
            max_batched_tokens=512, max_sequences=8, max_model_len=2048, prefill_reserve=0.0, chunk_tokens=chunk
        )
        scheduler = Scheduler(blocks, limits, b"gpu tests".ljust(16))
        runner = ModelRunner(graphed, rank.caches, rank.pool.generations, [BLOCK], device=CUDA, find_largest=largest)
        engine = Engine(scheduler, runner)
        sequences = []
        for i in indices:
            params = SamplingParams(max_tokens=24, ignore_eos=True)
            sequences.append(Sequence(i, RequestKey(str(i), 0), list(prompts[i]), len(prompts[i]), params, arrival=i))
            scheduler.add(sequences[-1])
        while engine.has_work:
            outcome = engine.step()
            assert outcome is None or outcome.error is None
        return {seq.id: seq.tokens[seq.num_prompt :] for seq in sequences}

    together = serve([0, 1, 2, 3, 4], 512)
    chunked = serve([0, 1, 2, 3, 4], 64)
    alone = {i: tokens for i in range(5) for tokens in serve([i], 512).values()}
    firsts = sum(together[i][0] == alone[i][0] == chunked[i][0] for i in range(5))
    assert firsts >= 4
    assert len({token for tokens in together.values() for token in tokens}) > 40


@torch.inference_mode()
def test_a_shared_expert_apart_is_the_same_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.layers import fused_mlp

    rank = Rank(LITE, tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (77,), device=CUDA)
    batch = batch_of([(0, 0, 77)])
    together = rank.model.forward(ids, batch)
    monkeypatch.setattr(fused_mlp, "DENSE_TOKENS", 1)
    apart = rank.model.forward(ids, batch)
    assert not torch.equal(together, apart)
    assert agreement(apart, together) < 0.06
