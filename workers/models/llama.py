"""Llama 2 and 3."""

from __future__ import annotations

from workers.models.fields import ConfigFields
from workers.models.grouped_query import GqaConfig, GqaForCausalLM, read_gqa


class LlamaForCausalLM(GqaForCausalLM):
    @classmethod
    def read(cls, fields: ConfigFields) -> GqaConfig:
        bias = fields.flag("attention_bias", False)
        config = read_gqa(fields, input_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
        fields.close()
        return config
