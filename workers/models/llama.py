"""Llama: dense decoder, grouped-query attention, SwiGLU. Parameter names are those of the checkpoints.

Shapes: T tokens, N rows with logits, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.interface import AttentionBackend, AttentionBatch, AttentionProblem, AttentionStep, KvCache
from workers.attention.resolver import Choice, Environment, build, resolve
from workers.layers.attention import GroupedQueryAttention
from workers.layers.linear import Embedding, Linear, Partition
from workers.layers.mlp import GatedMlp
from workers.layers.norm import RmsNorm
from workers.layers.rotary import Llama3Scaling, RotaryEmbedding, Rotation
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec

REGION = "kv"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """What the maths needs of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, fields: ConfigFields) -> LlamaConfig:
        """Raises CheckpointError for what is missing, malformed or not computed here."""
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            fields.refuse("num_key_value_heads", f"must divide num_attention_heads = {num_heads}")
        head_dim = fields.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            fields.refuse("head_dim", "must be even, rotary embeddings pair its halves")
        if fields.text("hidden_act", "silu") != "silu":
            fields.refuse("hidden_act", "Llama is computed with silu only")
        theta, scaling = _read_rope(fields)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.integer("max_position_embeddings", 2048),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=fields.flag("tie_word_embeddings", False),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
        )


def _read_rope(fields: ConfigFields) -> tuple[float, Llama3Scaling | None]:
    """Newer files hold everything in rope_parameters, older ones rope_theta and rope_scaling apart."""
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if section is None:
        return theta, None
    theta = section.number("rope_theta", theta)
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        section.refuse("rope_type", f"{kind!r} is not computed for Llama; default and llama3 are")
    return theta, Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )


class LlamaLayer(nn.Module):
    def __init__(self, index: int, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = GroupedQueryAttention(
            index,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            dtype=dtype,
        )
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, dtype=dtype, bias=config.mlp_bias)

    def forward(self, x: Tensor, rotation: Rotation, step: AttentionStep) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaDecoder(nn.Module):
    """The part that checkpoints call `model`."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(LlamaLayer(index, config, dtype) for index in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling)

    def forward(self, input_ids: Tensor, positions: Tensor, step: AttentionStep, capture: Sequence[int]) -> Tensor:
        x = self.embed_tokens(input_ids)
        rotation = self.rotary.rotation(positions, x.dtype)
        entering: list[Tensor] = []
        for layer in self.layers:
            entering.append(x)
            x = layer(x, rotation, step)
        if not capture:
            return self.norm(x)
        entering.append(x)
        return torch.cat([self.norm(x), *(entering[index] for index in capture)], -1)


class LlamaForCausalLM(nn.Module):
    """See `CausalModel`."""

    def __init__(self, config: LlamaConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.model = LlamaDecoder(config, spec.torch_dtype)
        if not config.tied:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, partition=Partition.COLUMN, dtype=spec.torch_dtype
            )
        self._cache: KvCache | None = None
        self._backend: AttentionBackend | None = None

    @classmethod
    def from_fields(
        cls, fields: ConfigFields, *, architecture: str, dtype: str, eos_token_ids: tuple[int, ...]
    ) -> LlamaForCausalLM:
        """Parameters lie on torch's default device; the loader makes them on "meta" and fills them."""
        config = LlamaConfig.read(fields)
        spec = ModelSpec(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=eos_token_ids,
            dtype=dtype,
            rope_convention="half_split",
        )
        return cls(config, spec)

    def kv_groups(self, block_size: int) -> tuple[GroupSpec, ...]:
        region = RegionSpec(
            name=REGION,
            num_layers=self.config.num_layers,
            page_format=PageFormat.KV_HEADS_FIRST,
            dtype=self.spec.dtype,
            block_size=block_size,
            kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
        )
        return (GroupSpec("self", block_size, (region,)),)

    def bind_kv(self, caches: Sequence[KvCache], environment: Environment | None = None) -> Choice:
        (self._cache,) = caches
        pages = self._cache.pages(REGION)
        problem = AttentionProblem(
            kind="gqa",
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            block_size=pages.shape[-2],
            dtype=pages.dtype,
            scale=self.config.head_dim**-0.5,
        )
        choice = resolve(problem, environment or Environment.probe(pages.device))
        self._backend = build(choice, problem)
        return choice

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        assert self._backend is not None and self._cache is not None, "bind_kv comes before the first forward"
        step = self._backend.begin(batch, 0, self._cache, REGION)
        return self.model(input_ids, batch.positions, step, capture_layers)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.embed_tokens.project(hidden) if self.config.tied else self.lm_head(hidden)
