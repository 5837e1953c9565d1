"""DeepSeek V2, V3 and V3.2: latent attention (V3.2 with a sparse indexer), experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.environment import Environment
from workers.attention.index_keys import index_key_region
from workers.attention.interface import AttentionBatch, KvCache
from workers.attention.mla_interface import INDEX_KEYS, LATENTS, MlaBackend, MlaProblem, MlaStep
from workers.attention.resolver import Choice, build_mla, resolve
from workers.layers.mla import LatentAttention
from workers.models.decoder import DecoderForCausalLM
from workers.models.deepseek_config import DeepseekConfig, read_deepseek
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec

if TYPE_CHECKING:
    from workers.attention.hopper_dsa import HopperDsa, HopperDsaStep
    from workers.attention.hopper_mla import HopperMla, HopperMlaStep


class DeepseekForCausalLM(DecoderForCausalLM[DeepseekConfig]):
    """Base of the generations; they add `read`."""

    rope_convention = "interleaved"

    def __init__(self, config: DeepseekConfig, spec: ModelSpec) -> None:
        super().__init__(config, spec)
        self._cache: KvCache | None = None
        self._backend: MlaBackend | HopperMla | HopperDsa | None = None

    def _attention(self, index: int, dtype: torch.dtype) -> LatentAttention:
        return LatentAttention(index, self.config.attention, dtype)

    def _rotated_size(self) -> int:
        return self.config.attention.rope_dim

    def kv_groups(self, block_size: int) -> tuple[GroupSpec, ...]:
        """Latents, and index keys where there is an indexer: same positions, same lifetime, one block table."""
        attention = self.config.attention
        num_layers, dtype = self.config.decoder.num_layers, self.spec.dtype
        latents = RegionSpec(
            name=LATENTS,
            num_layers=num_layers,
            page_format=PageFormat.ROWS,
            dtype=dtype,
            block_size=block_size,
            row_size=attention.latent_size + attention.rope_dim,
        )
        regions = (latents,)
        if attention.indexer is not None:
            size = attention.indexer.head_dim
            regions += (index_key_region(INDEX_KEYS, num_layers, block_size, size, dtype),)
        return (GroupSpec("self", block_size, regions),)

    def attention_problem(self, block_size: int, max_piece_tokens: int = 4096) -> MlaProblem:
        attention = self.config.attention
        return MlaProblem(
            num_heads=attention.num_heads,
            latent_size=attention.latent_size,
            rope_size=attention.rope_dim,
            block_size=block_size,
            dtype=self.spec.torch_dtype,
            scale=attention.scale,
            index_topk=None if attention.indexer is None else attention.indexer.topk,
            index_heads=None if attention.indexer is None else attention.indexer.num_heads,
            index_head_dim=None if attention.indexer is None else attention.indexer.head_dim,
            sliding_window=self.config.sliding_window,
            nope_size=attention.nope_dim,
            value_size=attention.value_dim,
            max_piece_tokens=max_piece_tokens,
        )

    def bind_kv(
        self, caches: Sequence[KvCache], environment: Environment | None = None, *, max_piece_tokens: int = 4096
    ) -> Choice:
        """`max_piece_tokens`: how much cached context a prompt's chunk expands at once. See `CausalModel`."""
        (self._cache,) = caches
        pages = self._cache.pages(LATENTS)
        problem = self.attention_problem(pages.shape[-2], max_piece_tokens)
        choice = resolve(problem, environment or Environment.probe(pages.device))
        self._backend = build_mla(choice, problem)
        self._fuse(choice)
        return choice

    def _begin(self, batch: AttentionBatch) -> MlaStep | HopperMlaStep | HopperDsaStep:
        assert self._backend is not None and self._cache is not None, "bind_kv comes before the first forward"
        return self._backend.begin(batch, 0, self._cache)


class DeepseekV2ForCausalLM(DeepseekForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> DeepseekConfig:
        return read_deepseek(fields, "V2")


class DeepseekV3ForCausalLM(DeepseekForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> DeepseekConfig:
        return read_deepseek(fields, "V3")


class DeepseekV32ForCausalLM(DeepseekForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> DeepseekConfig:
        return read_deepseek(fields, "V3.2")
