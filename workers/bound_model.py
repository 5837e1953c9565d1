"""A model on its device with the KV pool that it computes in, ready for steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.config import KvConfig, PoolConfig
from cluster.engine_config import EngineConfig
from cluster.log import Log
from kvtransfer.layout import KvGeometry, RankLayout
from kvtransfer.pool import KvPool
from workers.attention.environment import Environment
from workers.attention.interface import KvCache
from workers.attention.kv_views import kv_cache
from workers.attention.resolver import HOPPER
from workers.engine.cuda_graph import GraphedModel, default_prompt_sizes, default_sizes, static_bytes
from workers.engine.largest_step import run_largest_steps
from workers.engine.model_runner import StepModel
from workers.engine.sampler import FindLargest, find_largest
from workers.engine.scheduler_limits import SchedulerLimits
from workers.kv_memory import FreeMemory, num_blocks
from workers.models.encoder_decoder import EncoderDecoderModel
from workers.models.model import CausalModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundModel:
    """`steps` is the model itself, or what replays its steps."""

    steps: StepModel
    find_largest: FindLargest
    caches: list[KvCache]
    pool: KvPool


def bind_model(
    model: CausalModel,
    geometry: KvGeometry,
    limits: SchedulerLimits,
    *,
    device: torch.device,
    engine: EngineConfig,
    kv: KvConfig,
    pool: str,
    resources: PoolConfig,
) -> BoundModel:
    """Chooses how attention is computed, sizes the pool and allocates it. On a GPU the largest steps run first, and
    those that can be replayed are captured. Raises ConfigError."""
    environment = Environment.probe(device, disabled=engine.disabled, strict=engine.strict)
    max_lens = [limits.max_model_len, *([] if limits.max_source_tokens is None else [limits.max_source_tokens])]
    free = FreeMemory.of_host()
    sizes: list[int] = []
    finds = find_largest
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left
        _, caches = _allocate(geometry, [0] * len(geometry.groups), device)
        choice = model.bind_kv(caches, environment)
        if engine.cuda_graphs and choice.replays:
            sizes = default_sizes(limits.max_sequences, least_step=choice.least_graph_step)
        if choice.chosen == HOPPER:
            from workers.kernels.largest import largest

            finds = largest
        encoder = model if isinstance(model, EncoderDecoderModel) else None
        projects = kv.encoder_output == "hidden_states"
        run_largest_steps(model, limits, kv.block_size, device, finds, encoder=encoder, projects=projects)
        spec = model.spec
        num_forms = 1 if choice.dense_context is None else 2
        graphs = num_forms * static_bytes(sizes, spec.hidden_size, spec.vocab_size, spec.torch_dtype)
        free = FreeMemory.of_gpu(device, reserved_bytes=graphs, num_gpus=resources.gpus)
    count = num_blocks(kv, geometry.groups, max_lens, free, pool=pool, pool_blocks=resources.num_blocks)
    memory, caches = _allocate(geometry, count, device)
    choice = model.bind_kv(caches, environment)
    steps: StepModel = model
    if sizes:
        max_blocks, *max_fixed_blocks = (-(-length // kv.block_size) for length in max_lens)
        graphed = GraphedModel(
            model,
            sizes,
            max_blocks,
            device,
            dense_context=choice.dense_context,
            max_fixed_blocks=max_fixed_blocks,
            prompt_sizes=default_prompt_sizes(limits.max_batched_tokens) if choice.reads_spans else [],
        )
        graphed.capture()
        steps = graphed
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the pool's zeros are there before anybody reads it
    rejected = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected)
    log = Log(logging.getLogger("sluice.worker"))
    log.info("computing", device=str(environment), backend=choice.chosen, rejected=rejected, num_blocks=count[0])
    return BoundModel(steps=steps, find_largest=finds, caches=caches, pool=memory)


def _allocate(geometry: KvGeometry, count: Sequence[int], device: torch.device) -> tuple[KvPool, list[KvCache]]:
    pool = KvPool.allocate(geometry, RankLayout(0), count, device)
    return pool, [kv_cache(group, regions) for group, regions in zip(geometry.groups, pool.regions, strict=True)]
