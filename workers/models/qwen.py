"""Qwen2: biases on queries, keys and values. Qwen3 and Qwen3-MoE: a norm over each head's query and key instead;
experts in all or some layers, none shared.
"""

from __future__ import annotations

from workers.layers.moe import ExpertShape
from workers.models.fields import ConfigFields
from workers.models.grouped_query import GqaConfig, GqaForCausalLM, read_gqa
from workers.moe.routing import RoutingRule

_WINDOW = ("max_window_layers", "sliding_window")  # mean something with use_sliding_window only


class Qwen2ForCausalLM(GqaForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> GqaConfig:
        _refuse_windows(fields)
        fields.expect("use_mrope", False, "positions have one axis")
        config = read_gqa(fields, input_bias=True, output_bias=False)
        fields.close(_WINDOW)
        return config


class Qwen3ForCausalLM(GqaForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> GqaConfig:
        bias = fields.flag("attention_bias", False)
        _refuse_windows(fields)
        config = read_gqa(fields, input_bias=bias, output_bias=bias, head_norm=True)
        fields.close(_WINDOW)
        return config


class Qwen3MoeForCausalLM(GqaForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> GqaConfig:
        bias = fields.flag("attention_bias", False)
        _refuse_windows(fields)
        experts = ExpertShape(inner_size=fields.integer("moe_intermediate_size"), routing=_read_routing(fields))
        config = read_gqa(
            fields,
            input_bias=bias,
            output_bias=bias,
            head_norm=True,
            sparse_layers=_read_sparse_layers(fields),
            experts=experts,
        )
        fields.close(_WINDOW)
        return config


def _refuse_windows(fields: ConfigFields) -> None:
    """Raises CheckpointError when a layer sees less than its whole context."""
    fields.expect("use_sliding_window", False, "every token sees its whole context")
    kinds = fields.texts("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        fields.refuse("layer_types", "only full_attention is computed")


def _read_routing(fields: ConfigFields) -> RoutingRule:
    num_experts = fields.optional_integer("num_experts")
    newer = fields.optional_integer("num_local_experts")
    if num_experts is not None and newer not in (None, num_experts):
        fields.refuse("num_local_experts", f"num_experts = {num_experts} says otherwise; keep one of the two")
    rule = RoutingRule(
        num_experts=num_experts or newer or fields.integer("num_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        normalize=fields.flag("norm_topk_prob", False),
    )
    if rule.experts_per_token > rule.num_experts:
        fields.refuse("num_experts_per_tok", f"must be at most num_experts = {rule.num_experts}")
    return rule


def _read_sparse_layers(fields: ConfigFields) -> tuple[bool, ...]:
    num_layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    if any(index >= num_layers for index in dense):
        fields.refuse("mlp_only_layers", f"must be below num_hidden_layers = {num_layers}")
    return tuple((index + 1) % step == 0 and index not in dense for index in range(num_layers))
