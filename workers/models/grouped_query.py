"""Decoders with grouped-query attention: the maths that Llama, Mistral and Qwen share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBackend, AttentionBatch, AttentionProblem, AttentionStep, KvCache
from workers.attention.resolver import Choice, build, resolve
from workers.layers.attention import GqaShape, GroupedQueryAttention
from workers.layers.moe import ExpertShape
from workers.models.decoder import DecoderForCausalLM, DecoderShape
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec
from workers.models.rope import read_rope

REGION = "kv"


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaConfig:
    decoder: DecoderShape
    attention: GqaShape


def read_gqa(
    fields: ConfigFields,
    *,
    input_bias: bool,
    output_bias: bool,
    head_norm: bool = False,
    mlp_bias: bool = False,
    sparse_layers: tuple[bool, ...] | None = None,
    experts: ExpertShape | None = None,
) -> GqaConfig:
    """The keys that all these families have; the arguments are what they spell in their own ways.

    Raises CheckpointError for what is missing, malformed or not computed here.
    """
    fields.expect("hidden_act", "silu", "the gate of the feed-forward")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"must divide num_attention_heads = {num_heads}")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            fields.refuse("hidden_size", f"must be a multiple of num_attention_heads = {num_heads}, or give head_dim")
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        fields.refuse("head_dim", f"must be even, rotary embeddings pair the halves of a head of {head_dim}")
    norm_eps = fields.number("rms_norm_eps", 1e-6)
    decoder = DecoderShape(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        sparse_layers=sparse_layers or (False,) * fields.integer("num_hidden_layers"),
        experts=experts,
        mlp_bias=mlp_bias,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_eps=norm_eps,
        rope=read_rope(fields),
        tied=fields.flag("tie_word_embeddings", False),
    )
    attention = GqaShape(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        input_bias=input_bias,
        output_bias=output_bias,
        norm_eps=norm_eps if head_norm else None,
    )
    return GqaConfig(decoder=decoder, attention=attention)


class GqaForCausalLM(DecoderForCausalLM[GqaConfig]):
    """Base of the families; they add `read`."""

    rope_convention = "half_split"

    def __init__(self, config: GqaConfig, spec: ModelSpec) -> None:
        super().__init__(config, spec)
        self._cache: KvCache | None = None
        self._backend: AttentionBackend | None = None

    def _attention(self, index: int, dtype: torch.dtype) -> GroupedQueryAttention:
        return GroupedQueryAttention(index, self.config.attention, dtype)

    def _rotated_size(self) -> int:
        return self.config.attention.head_dim

    def kv_groups(self, block_size: int) -> tuple[GroupSpec, ...]:
        region = RegionSpec(
            name=REGION,
            num_layers=self.config.decoder.num_layers,
            page_format=PageFormat.KV_HEADS_FIRST,
            dtype=self.spec.dtype,
            block_size=block_size,
            kv_heads=self.config.attention.num_kv_heads,
            head_dim=self.config.attention.head_dim,
        )
        return (GroupSpec("self", block_size, (region,)),)

    def attention_problem(self, block_size: int) -> AttentionProblem:
        attention = self.config.attention
        return AttentionProblem(
            kind="gqa",
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            block_size=block_size,
            dtype=self.spec.torch_dtype,
            scale=attention.head_dim**-0.5,
        )

    def bind_kv(self, caches: Sequence[KvCache], environment: Environment | None = None) -> Choice:
        (self._cache,) = caches
        pages = self._cache.pages(REGION)
        problem = self.attention_problem(pages.shape[-2])
        choice = resolve(problem, environment or Environment.probe(pages.device))
        self._backend = build(choice, problem)
        self._fuse(choice)
        return choice

    def _begin(self, batch: AttentionBatch) -> AttentionStep:
        assert self._backend is not None and self._cache is not None, "bind_kv comes before the first forward"
        return self._backend.begin(batch, 0, self._cache, REGION)
