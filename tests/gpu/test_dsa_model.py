"""A model with a sparse indexer on the GPU against the plain layers, with both forms of its decode graphs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from tests.gpu.test_models import V3, agreement, batch_of
from workers.attention.environment import Environment
from workers.attention.index_tools import DEEP_GEMM, PAGE, TOPK
from workers.attention.interface import AttentionBatch, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.engine.cuda_graph import GraphedModel
from workers.models.deepseek import DeepseekForCausalLM
from workers.models.loader import load

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

V32 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "first_k_dense_replace": 3,  # no experts: a token that goes to others differs by more than what is compared here
}
STEPS = [
    [(0, 0, 130), (1, 0, 64), (2, 0, 3)],  # a prompt that chooses, and prompts that do not
    [(2, 3, 1), (1, 64, 30), (3, 0, 200)],  # a single token that sees everything, a dense chunk, a sparse one
    [(0, 130, 1), (2, 4, 1), (1, 94, 77)],  # single tokens choose, and one of them has less than that
    [(2, 5, 1), (1, 171, 33)],
    [(0, 131, 1), (1, 204, 1), (2, 6, 1), (3, 200, 1)],  # alone, sparse
    [(2, 7, 1), (4, 0, 1)],  # alone, dense
    [(3, 201, 300), (4, 1, 40), (1, 205, 2)],
]


# Almost all is chosen: what keys in fp8 choose otherwise weighs little.
LONG_STEPS = [
    [(0, 0, 500), (1, 0, 490), (2, 0, 480), (3, 0, 481)],
    [(0, 500, 1), (1, 490, 1), (2, 480, 30), (3, 481, 9)],
    [(0, 501, 1), (1, 491, 1), (2, 510, 1), (3, 490, 1), (4, 0, 1)],
    [(0, 502, 40), (1, 492, 60)],
]


class Rank:
    """A model with a pool of its own. `plain` and `rounded` compute with torch alone, on the same weights, in fp32 and
    in the model's own dtype."""

    def __init__(self, folder: Path, topk: int, disabled: tuple[str, ...] = ()) -> None:
        (folder / "config.json").write_text(json.dumps(V32 | {"index_topk": topk, "torch_dtype": "bfloat16"}))
        self.model = self._load(folder, "bfloat16")
        self.plain, self.rounded = self._load(folder, "float32"), self._load(folder, "bfloat16")
        weights = {name: copy.deepcopy(weight).float() for name, weight in self.model.state_dict().items()}
        self.plain.load_state_dict(weights, assign=True)
        self.caches = self._bind(self.model, Environment.probe(CUDA, disabled=disabled), "hopper")
        for model in (self.plain, self.rounded):
            self._bind(model, Environment.probe(CUDA, disabled=["triton"]), "reference")

    def _load(self, folder: Path, dtype: str) -> DeepseekForCausalLM:
        return cast(DeepseekForCausalLM, load(folder, load_format="dummy", device=CUDA, dtype=dtype).model)

    def _bind(self, model: DeepseekForCausalLM, environment: Environment, backend: str):
        groups = model.kv_groups(PAGE)
        pool = KvPool.allocate(KvGeometry(groups, model.spec.rope_convention), RankLayout(0, 0, 1), [60], CUDA)
        caches = [kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)]
        assert model.bind_kv(caches, environment).chosen == backend
        return caches


@pytest.mark.parametrize("disabled", [(), (DEEP_GEMM, TOPK)])
@pytest.mark.parametrize(("topk", "steps", "bound"), [(128, STEPS, 0.5), (480, LONG_STEPS, 0.15)])
@torch.inference_mode()
def test_logits_agree_with_fp32(
    topk: int, steps: list[list[tuple[int, int, int]]], bound: float, disabled: tuple[str, ...], tmp_path: Path
) -> None:
    """As far from fp32 as plain layers in bf16 with keys in fp8 are, and no farther: they choose as much otherwise."""
    rank = Rank(tmp_path, topk, disabled)
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (5, 600), device=CUDA)
    logits: list[list[Tensor]] = []
    for rows in steps:
        batch = batch_of(rows)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        logits.append([model.logits(model.forward(ids, batch)) for model in (rank.model, rank.rounded, rank.plain)])
        ours, rounded, plain = logits[-1]
        print(rows, agreement(ours, plain), agreement(rounded, plain), agreement(ours, rounded))
    ours, rounded, plain = (torch.cat(parts) for parts in zip(*logits, strict=True))
    print("all", agreement(ours, plain), agreement(rounded, plain), agreement(ours, rounded))
    assert agreement(ours, plain) < min(bound, 1.3 * agreement(rounded, plain) + 0.01)


@torch.inference_mode()
def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 128)
    steps = [(batch_of(rows), torch.randint(0, 1000, (sum(new for *_, new in rows),), device=CUDA)) for rows in STEPS]
    for batch, ids in steps:
        rank.model.forward(ids, batch)  # compiles, and makes the plans
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch, ids in steps:
            rank.model.forward(ids, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_graphs_of_both_forms_equal_eager(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 128)
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (5, 600), device=CUDA)
    graphed = GraphedModel(rank.model, [2, 4], 9, CUDA, dense_context=128)
    graphed.capture()
    for rows in STEPS:
        batch = batch_of(rows)
        ids = torch.cat([tokens[number, cached : cached + new] for number, cached, new in rows])
        replayed = graphed.logits(graphed.forward(ids, batch)).clone()
        kept = [pages.clone() for cache in rank.caches for pages in cache.regions.values()]
        size = graphed.padded_size(batch)
        if size is None:
            continue
        padding = size - len(rows)
        eager = padded(batch, padding)
        want = rank.model.logits(rank.model.forward(torch.cat((ids, ids.new_zeros(padding))), eager))
        assert torch.equal(replayed, want[: len(rows)]), rows
        now = [pages for cache in rank.caches for pages in cache.regions.values()]
        assert all(torch.equal(a[1:], b[1:]) for a, b in zip(kept, now, strict=True)), "the same bytes were written"


def padded(batch: AttentionBatch, count: int) -> AttentionBatch:
    """With single tokens at position 0 of the null block behind the others."""
    (group,) = batch.groups
    zeros = torch.zeros(count, dtype=torch.int64, device=CUDA)
    size = batch.num_sequences + count
    return replace(
        batch,
        num_sequences=size,
        num_decodes=size,
        query_lens=[1] * size,
        query_starts=list(range(size + 1)),
        context_lens=[*batch.context_lens, *[1] * count],
        positions=torch.cat((batch.positions, zeros)),
        groups=(
            GroupMetadata(
                torch.cat((group.block_table, group.block_table.new_zeros(count, group.block_table.shape[1]))),
                torch.cat((group.slot_mapping, zeros)),
            ),
        ),
    )
