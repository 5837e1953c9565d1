"""DeepSeek V3 and V3.2: latent attention (V3.2 with a sparse indexer), experts. Parameter names are those of the
checkpoints. Shapes: T tokens, N rows with logits, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.interface import AttentionBatch, KvCache
from workers.attention.mla_interface import INDEX_KEYS, LATENTS, MlaBackend, MlaProblem, MlaStep
from workers.attention.resolver import Choice, Environment, build_mla, resolve
from workers.layers.linear import Embedding, Linear, Partition
from workers.layers.mla import IndexerShape, LatentAttention, MlaShape
from workers.layers.mlp import GatedMlp
from workers.layers.moe import SparseMlp
from workers.layers.norm import RmsNorm
from workers.layers.rotary import RotaryEmbedding, Rotation, YarnScaling, yarn_mscale
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec
from workers.moe.routing import RoutingRule


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig:
    """What the maths needs of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    expert_size: int
    num_shared_experts: int
    sparse_layers: tuple[bool, ...]  # per layer: experts, or one dense feed-forward
    num_draft_layers: int  # stored behind the others, and not computed
    attention: MlaShape
    routing: RoutingRule
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    sliding_window: int | None
    tied: bool

    @property
    def num_layers(self) -> int:
        return len(self.sparse_layers)

    @classmethod
    def read(cls, fields: ConfigFields) -> DeepseekConfig:
        """Raises CheckpointError for what is missing, malformed or not computed here."""
        if fields.section("quantization_config") is not None:
            fields.refuse("quantization_config", "quantized weights are not computed; convert them to bfloat16")
        if fields.text("hidden_act", "silu") != "silu":
            fields.refuse("hidden_act", "DeepSeek is computed with silu only")
        if not fields.flag("rope_interleave", True):
            fields.refuse("rope_interleave", "rotary weights must be interleaved")
        theta, scaling, sharpness = _read_rope(fields)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            num_shared_experts=fields.integer("n_shared_experts", 0, minimum=0),
            sparse_layers=_read_sparse_layers(fields),
            num_draft_layers=fields.integer("num_nextn_predict_layers", 1, minimum=0),
            attention=_read_attention(fields, sharpness),
            routing=_read_routing(fields),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=fields.optional_integer("sliding_window"),
            tied=fields.flag("tie_word_embeddings", False),
        )


def _read_attention(fields: ConfigFields, sharpness: float) -> MlaShape:
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    if rope % 2:
        fields.refuse("qk_rope_head_dim", "must be even, rotary embeddings rotate pairs")
    query_latent_size = fields.optional_integer("q_lora_rank")
    topk = fields.optional_integer("index_topk")
    indexer = None
    if topk is not None:
        if query_latent_size is None:
            fields.refuse("q_lora_rank", "a model with index_topk needs it, index queries are made of query latents")
        indexer = IndexerShape(
            num_heads=fields.integer("index_n_heads"), head_dim=fields.integer("index_head_dim"), topk=topk
        )
        if indexer.head_dim < rope:
            fields.refuse("index_head_dim", f"must be at least qk_rope_head_dim = {rope}")
    return MlaShape(
        hidden_size=fields.integer("hidden_size"),
        num_heads=fields.integer("num_attention_heads"),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=fields.integer("v_head_dim"),
        latent_size=fields.integer("kv_lora_rank"),
        query_latent_size=query_latent_size,
        bias=fields.flag("attention_bias", False),
        scale=(nope + rope) ** -0.5 * sharpness,
        indexer=indexer,
    )


def _read_routing(fields: ConfigFields) -> RoutingRule:
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if fields.text(key, known) != known:
            fields.refuse(key, f"experts are chosen with {known} only")
    experts, groups = fields.integer("n_routed_experts"), fields.integer("n_group", 1)
    if experts % groups:
        fields.refuse("n_group", f"must divide n_routed_experts = {experts}")
    rule = RoutingRule(
        num_experts=experts,
        num_groups=groups,
        max_groups=fields.integer("topk_group", 1),
        experts_per_token=fields.integer("num_experts_per_tok"),
        normalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    if rule.max_groups > groups:
        fields.refuse("topk_group", f"must be at most n_group = {groups}")
    if rule.experts_per_token > experts // groups * rule.max_groups:
        fields.refuse("num_experts_per_tok", "is more than topk_group groups of experts hold")
    return rule


def _read_sparse_layers(fields: ConfigFields) -> tuple[bool, ...]:
    num_layers = fields.integer("num_hidden_layers")
    kinds = fields.texts("mlp_layer_types")
    if kinds is None:
        if fields.integer("moe_layer_freq", 1) != 1:
            fields.refuse("moe_layer_freq", "only 1 is computed; name the layers in mlp_layer_types")
        first = fields.integer("first_k_dense_replace", 0, minimum=0)
        return tuple(index >= first for index in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        fields.refuse("mlp_layer_types", f"must hold dense or sparse for each of {num_layers} layers")
    return tuple(kind == "sparse" for kind in kinds)


def _read_rope(fields: ConfigFields) -> tuple[float, YarnScaling | None, float]:
    """Base, scaling, and the factor of the softmax scale."""
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if section is None:
        return theta, None, 1.0
    theta = section.number("rope_theta", theta)
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return theta, None, 1.0
    if kind != "yarn":
        section.refuse("rope_type", f"{kind!r} is not computed for DeepSeek; default and yarn are")
    if not section.flag("truncate", True):
        section.refuse("truncate", "only true is computed")
    factor = section.number("factor")
    mscale, all_dim = (section.number(key, 0.0, minimum=0.0) for key in ("mscale", "mscale_all_dim"))
    stretched = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else None
    scaling = YarnScaling(
        factor=factor,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
        attention_factor=section.number(
            "attention_factor", yarn_mscale(factor, 1.0) if stretched is None else stretched
        ),
    )
    return theta, scaling, yarn_mscale(factor, all_dim) ** 2 if all_dim else 1.0


class DeepseekLayer(nn.Module):
    def __init__(self, index: int, config: DeepseekConfig, dtype: torch.dtype) -> None:
        super().__init__()
        d = config.hidden_size
        self.input_layernorm = RmsNorm(d, config.norm_eps, dtype=dtype)
        self.self_attn = LatentAttention(index, config.attention, dtype)
        self.post_attention_layernorm = RmsNorm(d, config.norm_eps, dtype=dtype)
        self.mlp = (
            SparseMlp(d, config.expert_size, config.num_shared_experts, config.routing, dtype=dtype)
            if config.sparse_layers[index]
            else GatedMlp(d, config.intermediate_size, dtype=dtype)
        )

    def forward(self, x: Tensor, rotation: Rotation, step: MlaStep) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekDecoder(nn.Module):
    """The part that checkpoints call `model`."""

    def __init__(self, config: DeepseekConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DeepseekLayer(index, config, dtype) for index in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.rotary = RotaryEmbedding(config.attention.rope_dim, config.rope_theta, config.rope_scaling)

    def forward(self, input_ids: Tensor, positions: Tensor, step: MlaStep, capture: Sequence[int]) -> Tensor:
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


class DeepseekForCausalLM(nn.Module):
    """See `CausalModel`."""

    def __init__(self, config: DeepseekConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.model = DeepseekDecoder(config, spec.torch_dtype)
        if not config.tied:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, partition=Partition.COLUMN, dtype=spec.torch_dtype
            )
        self._cache: KvCache | None = None
        self._backend: MlaBackend | None = None

    @classmethod
    def from_fields(
        cls, fields: ConfigFields, *, architecture: str, dtype: str, eos_token_ids: tuple[int, ...]
    ) -> DeepseekForCausalLM:
        """Parameters lie on torch's default device; the loader makes them on "meta" and fills them."""
        config = DeepseekConfig.read(fields)
        drafts = range(config.num_layers, config.num_layers + config.num_draft_layers)
        spec = ModelSpec(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=eos_token_ids,
            dtype=dtype,
            rope_convention="interleaved",
            dropped_prefixes=tuple(f"model.layers.{index}." for index in drafts),
        )
        return cls(config, spec)

    def kv_groups(self, block_size: int) -> tuple[GroupSpec, ...]:
        """Latents, and index keys where there is an indexer: same positions, same lifetime, one block table."""
        attention = self.config.attention
        sizes = {LATENTS: attention.latent_size + attention.rope_dim}
        if attention.indexer is not None:
            sizes[INDEX_KEYS] = attention.indexer.head_dim
        regions = tuple(
            RegionSpec(
                name=name,
                num_layers=self.config.num_layers,
                page_format=PageFormat.ROWS,
                dtype=self.spec.dtype,
                block_size=block_size,
                row_size=size,
            )
            for name, size in sizes.items()
        )
        return (GroupSpec("self", block_size, regions),)

    def bind_kv(
        self, caches: Sequence[KvCache], environment: Environment | None = None, *, max_piece_tokens: int = 4096
    ) -> Choice:
        """`max_piece_tokens`: how much cached context a prompt's chunk expands at once. See `CausalModel`."""
        (self._cache,) = caches
        pages = self._cache.pages(LATENTS)
        attention = self.config.attention
        problem = MlaProblem(
            num_heads=attention.num_heads,
            latent_size=attention.latent_size,
            rope_size=attention.rope_dim,
            block_size=pages.shape[-2],
            dtype=pages.dtype,
            scale=attention.scale,
            index_topk=None if attention.indexer is None else attention.indexer.topk,
            sliding_window=self.config.sliding_window,
            max_piece_tokens=max_piece_tokens,
        )
        choice = resolve(problem, environment or Environment.probe(pages.device))
        self._backend = build_mla(choice, problem)
        return choice

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        assert self._backend is not None and self._cache is not None, "bind_kv comes before the first forward"
        step = self._backend.begin(batch, 0, self._cache)
        return self.model(input_ids, batch.positions, step, capture_layers)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.embed_tokens.project(hidden) if self.config.tied else self.lm_head(hidden)
