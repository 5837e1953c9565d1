"""The steps before the first request: of every size, on a pool that is the null block alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from tests.support.checkpoints import checkpoint
from tests.support.engines import limits
from workers.attention.kv_views import kv_cache
from workers.attention.packed import PackedBackend, TorchKernels
from workers.engine.largest_step import chunks, longest_input, run_largest_steps, step_sizes
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.loader import load

CPU = torch.device("cpu")


def test_sizes_are_powers_of_two_and_the_odd_ones_behind_them() -> None:
    assert step_sizes(1) == [1]
    assert step_sizes(9) == [1, 2, 3, 4, 5, 6, 8, 9]
    assert step_sizes(512)[-6:] == [256, 257, 258, 264, 511, 512]


def test_a_step_of_any_size_is_of_chunks_and_has_its_decodes_first() -> None:
    assert [chunks(size, 4) for size in (1, 4, 8, 9, 11)] == [[1], [4], [4, 4], [1, 4, 4], [3, 4, 4]]


@pytest.mark.parametrize("family", ["llama", "deepseek-v32"])
@pytest.mark.parametrize("max_model_len", [32, 200])
def test_they_need_no_block(family: str, max_model_len: int) -> None:
    model = load(checkpoint(family)).model
    groups = model.kv_groups(16)
    pool = KvPool.allocate(KvGeometry(groups, model.spec.rope_convention), RankLayout(0), [0])
    model.bind_kv([kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)])
    allowed = limits(max_batched_tokens=96, max_sequences=4, max_model_len=max_model_len, chunk_tokens=32)
    run_largest_steps(model, allowed, 16, CPU)
    assert all(region.any() for region in pool.regions[0]) and pool.num_blocks == [1]


def test_an_input_is_as_long_as_positions_and_the_budget_let_it_be() -> None:
    assert longest_input(limits(max_encoder_tokens=100)) == 100
    assert longest_input(replace(limits(max_encoder_tokens=100), max_source_tokens=64)) == 64
    assert longest_input(replace(limits(max_encoder_tokens=100), max_source_tokens=512)) == 100


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_encoder_inputs_are_read_too(family: str, *, projects: bool, packed: bool) -> None:
    """Also with what a GPU computes with, but for its kernels."""
    model = load(checkpoint(family)).model
    assert isinstance(model, EncoderDecoderModel)
    groups = model.kv_groups(16, "hidden_states" if projects else "cross_kv")
    pool = KvPool.allocate(KvGeometry(groups, "none"), RankLayout(0), [0, 0])
    caches = [kv_cache(group, regions) for group, regions in zip(groups, pool.regions, strict=True)]
    model.bind_kv(caches, backend=PackedBackend(model.attention_problem(16), TorchKernels()) if packed else None)
    allowed = replace(
        limits(max_batched_tokens=48, max_sequences=4, max_model_len=40, chunk_tokens=24, max_encoder_tokens=50),
        max_source_tokens=20,
    )
    run_largest_steps(model, allowed, 16, CPU, encoder=model, projects=projects)
    assert all(region.any() for group in pool.regions for region in group) and pool.num_blocks == [1, 1]
