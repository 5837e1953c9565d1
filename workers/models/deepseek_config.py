"""What config.json says about a DeepSeek: latent attention, experts and how they are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from workers.layers.mla import IndexerShape, MlaShape
from workers.layers.moe import ExpertShape
from workers.models.decoder import DecoderShape
from workers.models.fields import ConfigFields
from workers.models.rope import read_rope
from workers.moe.routing import RoutingRule

Generation: TypeAlias = Literal["V2", "V3", "V3.2"]
# Said again elsewhere (sizes), or about a feature that every one of them has.
_UNUSED = ("head_dim", "qk_head_dim")

_INDEXED = frozenset({"indexed_attention", "deepseek_sparse_attention"})  # one kind, named anew by transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig:
    decoder: DecoderShape
    attention: MlaShape
    sliding_window: int | None


def read_deepseek(fields: ConfigFields, generation: Generation) -> DeepseekConfig:
    """Closes the fields. Raises CheckpointError for what is missing, malformed or not computed here."""
    fields.expect("hidden_act", "silu", "the gate of the feed-forward")
    fields.expect("rope_interleave", True, "rotary weights are interleaved")
    mlp_bias = False
    if generation == "V2":
        mlp_bias = fields.flag("mlp_bias", False)
    else:
        fields.expect("mlp_bias", False, f"DeepSeek {generation} has no such bias")
    rope = read_rope(fields)
    num_shared = fields.integer("n_shared_experts", minimum=0)
    decoder = DecoderShape(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        sparse_layers=_read_sparse_layers(fields),
        experts=ExpertShape(
            inner_size=fields.integer("moe_intermediate_size"),
            routing=_read_routing_v2(fields) if generation == "V2" else _read_routing(fields),
            num_shared=num_shared,
            shared_bias=mlp_bias,
        ),
        mlp_bias=mlp_bias,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tied=fields.flag("tie_word_embeddings", False),
        num_draft_layers=0 if generation == "V2" else fields.integer("num_nextn_predict_layers", 1, minimum=0),
    )
    attention = _read_attention(fields, rope.sharpness, sparse=generation == "V3.2")
    window = fields.optional_integer("sliding_window")
    fields.close(_UNUSED)
    return DeepseekConfig(decoder=decoder, attention=attention, sliding_window=window)


def _read_attention(fields: ConfigFields, sharpness: float, *, sparse: bool) -> MlaShape:
    num_heads = fields.integer("num_attention_heads")
    fields.expect("num_key_value_heads", num_heads, "all heads expand the same latents")
    nope, rope = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    if rope % 2:
        fields.refuse("qk_rope_head_dim", "must be even, rotary embeddings rotate pairs")
    query_latent_size = fields.optional_integer("q_lora_rank")
    indexer = None
    if sparse:
        kinds = fields.texts("layer_types")
        if kinds is not None and not set(kinds) <= _INDEXED:
            fields.refuse("layer_types", f"only {' or '.join(sorted(_INDEXED))} is computed")
        if query_latent_size is None:
            fields.refuse("q_lora_rank", "a model with index_topk needs it, index queries are made of query latents")
        indexer = IndexerShape(
            num_heads=fields.integer("index_n_heads"),
            head_dim=fields.integer("index_head_dim"),
            topk=fields.integer("index_topk"),
        )
        if indexer.head_dim < rope:
            fields.refuse("index_head_dim", f"must be at least qk_rope_head_dim = {rope}")
    return MlaShape(
        hidden_size=fields.integer("hidden_size"),
        num_heads=num_heads,
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
    fields.expect("scoring_func", "sigmoid", "V3's experts are scored one by one")
    fields.expect("topk_method", "noaux_tc", "V3's experts are chosen with a bias that balances load")
    num_groups, max_groups = _read_groups(fields)
    return _checked(
        fields,
        RoutingRule(
            num_experts=fields.integer("n_routed_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            normalize=_required_flag(fields, "norm_topk_prob"),
            scale=fields.number("routed_scaling_factor"),
            scoring="sigmoid",
            balanced=True,
            num_groups=num_groups,
            max_groups=max_groups,
            best_of_group=2,
        ),
    )


def _read_routing_v2(fields: ConfigFields) -> RoutingRule:
    fields.expect("scoring_func", "softmax", "V2's experts are scored against each other")
    fields.expect("norm_topk_prob", False, "V2's weights are not made to add up to 1")
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        fields.refuse("topk_method", "V2's experts are chosen with greedy or group_limited_greedy")
    num_groups, max_groups = 1, 1
    if method == "group_limited_greedy":
        num_groups, max_groups = _read_groups(fields)
    else:
        _, _ = fields.optional_integer("n_group"), fields.optional_integer("topk_group")  # greedy does not ask
    return _checked(
        fields,
        RoutingRule(
            num_experts=fields.integer("n_routed_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            normalize=False,
            scale=fields.number("routed_scaling_factor"),
            num_groups=num_groups,
            max_groups=max_groups,
        ),
    )


def _read_groups(fields: ConfigFields) -> tuple[int, int]:
    num_groups, max_groups = fields.integer("n_group"), fields.integer("topk_group")
    experts = fields.integer("n_routed_experts")
    if experts % num_groups:
        fields.refuse("n_group", f"must divide n_routed_experts = {experts}")
    if max_groups > num_groups:
        fields.refuse("topk_group", f"must be at most n_group = {num_groups}")
    return num_groups, max_groups


def _checked(fields: ConfigFields, rule: RoutingRule) -> RoutingRule:
    if rule.experts_per_token > rule.num_experts // rule.num_groups * rule.max_groups:
        fields.refuse("num_experts_per_tok", "is more than topk_group groups of experts hold")
    return rule


def _required_flag(fields: ConfigFields, key: str) -> bool:
    """Generations differ in what they take for granted, so that nothing is."""
    if not fields.has(key):
        fields.refuse(key, "must be true or false")
    return fields.flag(key, False)


def _read_sparse_layers(fields: ConfigFields) -> tuple[bool, ...]:
    num_layers = fields.integer("num_hidden_layers")
    kinds = fields.texts("mlp_layer_types")
    fields.expect("moe_layer_freq", 1, "name the layers in mlp_layer_types")
    first = fields.integer("first_k_dense_replace", None if kinds is None else 0, minimum=0)
    if kinds is None:
        return tuple(index >= first for index in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        fields.refuse("mlp_layer_types", f"must hold dense or sparse for each of {num_layers} layers")
    return tuple(kind == "sparse" for kind in kinds)
