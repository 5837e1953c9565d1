"""BART and mBART: learned positions, layer norms with biases. BART norms behind each part, mBART before it and once
more behind each stack. Parameter names are those of the checkpoints.

Source: Lewis et al., "BART" (2019); Liu et al., "Multilingual Denoising Pre-training" (2020).
Shapes: T decoder tokens, S packed encoder tokens, N rows with logits, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from workers.attention.interface import (
    AttentionStep,
    CrossAttention,
    CrossKeys,
    EncoderAttention,
    EncoderBatch,
    EncoderDecoderBackend,
)
from workers.layers.activation import ACTIVATIONS
from workers.layers.encoder_decoder import AttentionNames, FeedForward, HeadedAttention, HeadShape
from workers.layers.linear import Embedding
from workers.layers.norm import LayerNorm
from workers.models.encoder_decoder import EncoderDecoderModel, ForcedTokens, StackShape, model_spec
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec

_NAMES = AttentionNames("q_proj", "k_proj", "v_proj", "out_proj")
_FIRST_POSITION = 2  # the rows before it stood for padding once
_NORM_EPS = 1e-5
_DROPPED = ("model.encoder.embed_tokens.", "model.decoder.embed_tokens.")
_UNUSED = (
    "_num_labels",
    "activation_dropout",
    "add_bias_logits",
    "classif_dropout",
    "classifier_dropout",
    "decoder_layerdrop",
    "dropout",
    "encoder_layerdrop",
    "extra_pos_embeddings",
    "force_bos_token_to_be_generated",
    "gradient_checkpointing",
    "init_std",
    "num_hidden_layers",
    "output_past",
    "save_step",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BartConfig:
    shape: StackShape
    num_encoder_layers: int
    num_encoder_heads: int
    encoder_inner_size: int
    decoder_inner_size: int
    activation: str
    embedding_scale: float
    norms_first: bool


def _read(fields: ConfigFields, *, norms_first: bool) -> BartConfig:
    activation = fields.text("activation_function", "gelu")
    if activation not in ACTIVATIONS:
        fields.refuse("activation_function", f"{', '.join(ACTIVATIONS)} are computed")
    fields.expect("tie_word_embeddings", True, "the head is the embedding")
    fields.expect("normalize_before", norms_first, "where this architecture norms")
    fields.expect("add_final_layer_norm", norms_first, "where this architecture norms")
    fields.expect("normalize_embedding", True, "the sum of embeddings is normed")
    fields.expect("static_position_embeddings", False, "positions are learned")
    hidden_size = fields.integer("d_model")
    heads = {side: fields.integer(f"{side}_attention_heads") for side in ("encoder", "decoder")}
    for side, count in heads.items():
        if hidden_size % count:
            fields.refuse(f"{side}_attention_heads", f"must divide d_model = {hidden_size}")
    head_dim = hidden_size // heads["decoder"]
    config = BartConfig(
        shape=StackShape(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_heads=heads["decoder"],
            head_dim=head_dim,
            num_decoder_layers=fields.integer("decoder_layers"),
            scale=head_dim**-0.5,
            max_positions=fields.integer("max_position_embeddings"),
        ),
        num_encoder_layers=fields.integer("encoder_layers"),
        num_encoder_heads=heads["encoder"],
        encoder_inner_size=fields.integer("encoder_ffn_dim"),
        decoder_inner_size=fields.integer("decoder_ffn_dim"),
        activation=activation,
        embedding_scale=hidden_size**0.5 if fields.flag("scale_embedding", False) else 1.0,
        norms_first=norms_first,
    )
    fields.close(_UNUSED, has_encoder=True)
    return config


class BartLayer(nn.Module):
    """Self-attention, attention to the encoder in a decoder, feed-forward."""

    def __init__(self, config: BartConfig, dtype: torch.dtype, *, is_decoder: bool) -> None:
        super().__init__()
        self._norms_first = config.norms_first
        d = config.shape.hidden_size
        num_heads = config.shape.num_heads if is_decoder else config.num_encoder_heads
        heads = HeadShape(d, num_heads, d // num_heads, bias=True)
        self.self_attn = HeadedAttention(_NAMES, heads, dtype)
        self.self_attn_layer_norm = LayerNorm(d, _NORM_EPS, dtype=dtype)
        if is_decoder:
            self.encoder_attn = HeadedAttention(_NAMES, heads, dtype)
            self.encoder_attn_layer_norm = LayerNorm(d, _NORM_EPS, dtype=dtype)
        inner_size = config.decoder_inner_size if is_decoder else config.encoder_inner_size
        activation = ACTIVATIONS[config.activation]
        feed_forward = FeedForward(("fc1",), "fc2", (d, inner_size), activation, bias=True, dtype=dtype)
        for name, module in feed_forward.named_children():  # checkpoints have both matrices in the layer itself
            self.add_module(name, module)
        self._feed_forward = (feed_forward,)
        self.final_layer_norm = LayerNorm(d, _NORM_EPS, dtype=dtype)

    def encode(self, x: Tensor, step: EncoderAttention) -> Tensor:
        x = self._add(x, self.self_attn_layer_norm, lambda y: self.self_attn.encode(y, step))
        return self._add(x, self.final_layer_norm, self._feed_forward[0])

    def decode(self, layer: int, x: Tensor, step: AttentionStep, cross: CrossAttention) -> Tensor:
        x = self._add(x, self.self_attn_layer_norm, lambda y: self.self_attn.decode(layer, y, step))
        x = self._add(x, self.encoder_attn_layer_norm, lambda y: self.encoder_attn.read(layer, y, cross))
        return self._add(x, self.final_layer_norm, self._feed_forward[0])

    def _add(self, x: Tensor, norm: LayerNorm, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + part(norm(x)) if self._norms_first else norm.of_sum(x, part(x))[1]


class BartStack(nn.Module):
    def __init__(self, num_layers: int, config: BartConfig, dtype: torch.dtype, *, is_decoder: bool) -> None:
        super().__init__()
        d = config.shape.hidden_size
        self._scale = config.embedding_scale
        self.head_dim = d // (config.shape.num_heads if is_decoder else config.num_encoder_heads)
        self.embed_positions = Embedding(config.shape.max_positions + _FIRST_POSITION, d, dtype=dtype)
        self.layernorm_embedding = LayerNorm(d, _NORM_EPS, dtype=dtype)
        self.stack = tuple(BartLayer(config, dtype, is_decoder=is_decoder) for _ in range(num_layers))
        self.layers = nn.ModuleList(self.stack)
        self.layer_norm = LayerNorm(d, _NORM_EPS, dtype=dtype) if config.norms_first else None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embedded tokens [T, d] and their positions [T] -> [T, d]."""
        return self.layernorm_embedding(tokens * self._scale + self.embed_positions(positions + _FIRST_POSITION))

    def end(self, x: Tensor) -> Tensor:
        return x if self.layer_norm is None else self.layer_norm(x)


class BartModel(nn.Module):
    """The part that checkpoints call `model`."""

    def __init__(self, config: BartConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.shared = Embedding(config.shape.vocab_size, config.shape.hidden_size, dtype=dtype)
        self.encoder = BartStack(config.num_encoder_layers, config, dtype, is_decoder=False)
        self.decoder = BartStack(config.shape.num_decoder_layers, config, dtype, is_decoder=True)


class BartForConditionalGeneration(EncoderDecoderModel):
    norms_first: ClassVar[bool] = False

    def __init__(self, config: BartConfig, spec: ModelSpec) -> None:
        super().__init__(config.shape, spec)
        dtype = spec.torch_dtype
        self.model = BartModel(config, dtype)
        bias = torch.empty(1, config.shape.vocab_size, dtype=dtype)
        self.final_logits_bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_fields(
        cls,
        fields: ConfigFields,
        *,
        architecture: str,
        dtype: str,
        eos_token_ids: tuple[int, ...],
        forced: ForcedTokens,
    ) -> Self:
        config = _read(fields, norms_first=cls.norms_first)
        spec = model_spec(
            fields,
            config.shape,
            forced,
            architecture=architecture,
            dtype=dtype,
            eos_token_ids=eos_token_ids,
            dropped_prefixes=_DROPPED,
            stand_ins=(("final_logits_bias", None),),
        )
        return cls(config, spec)

    def _run_encoder(self, input_ids: Tensor, batch: EncoderBatch, backend: EncoderDecoderBackend) -> Tensor:
        stack = self.model.encoder
        positions = torch.cat([torch.arange(length) for length in batch.lens]).to(input_ids.device, non_blocking=True)
        step = backend.encoder(batch, stack.head_dim**-0.5, None)
        x = stack.embed(self.model.shared(input_ids), positions)
        for layer in stack.stack:
            x = layer.encode(x, step)
        return stack.end(x)

    def _keep(self, states: Tensor, writer: CrossKeys) -> None:
        for index, layer in enumerate(self.model.decoder.stack):
            layer.encoder_attn.keep(index, states, writer)

    def _run_decoder(self, input_ids: Tensor, positions: Tensor, step: AttentionStep, cross: CrossAttention) -> Tensor:
        stack = self.model.decoder
        x = stack.embed(self.model.shared(input_ids), positions)
        for index, layer in enumerate(stack.stack):
            x = layer.decode(index, x, step, cross)
        return stack.end(x)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.shared.project(hidden) + self.final_logits_bias


class MBartForConditionalGeneration(BartForConditionalGeneration):
    """mBART and mBART-50: languages are tokens, the decoder's first (mBART) or its forced second (mBART-50)."""

    norms_first = True
