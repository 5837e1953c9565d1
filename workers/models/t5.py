"""T5: relative position bias instead of positions, RMS norms before every part, scores that are not scaled.

Version 1.0 (relu, the output scaled before a head that is the embedding) and 1.1, Flan (gated gelu, a head of its
own). Parameter names are those of the checkpoints. Source: Raffel et al. 2020, and the 1.1 notes of its authors.

Shapes: T decoder tokens, S packed encoder tokens, N rows with logits, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from cluster.errors import CheckpointError
from workers.attention.interface import (
    AttentionStep,
    CrossAttention,
    CrossKeys,
    EncoderAttention,
    EncoderBatch,
    EncoderDecoderBackend,
)
from workers.attention.relative_bias import bidirectional_bias, causal_bias
from workers.layers.activation import ACTIVATIONS
from workers.layers.blocked_linear import BlockedLinear
from workers.layers.encoder_decoder import AttentionNames, FeedForward, HeadedAttention, HeadShape
from workers.layers.linear import Embedding, Partition
from workers.layers.norm import RmsNorm
from workers.models.encoder_decoder import EncoderDecoderModel, ForcedTokens, StackShape, model_spec
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec

# Relative positions have no end; this bounds the bias that one long input asks memory for.
_MAX_POSITIONS = 8192
_NAMES = AttentionNames("q", "k", "v", "o")
# Copies of the embedding, and a bias table that old checkpoints carry for a place where there is none.
_DROPPED = (
    "encoder.embed_tokens.",
    "decoder.embed_tokens.",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",
)
_UNUSED = (
    "classifier_dropout",
    "dense_act_fn",
    "dropout_rate",
    "initializer_factor",
    "is_gated_act",
    "n_positions",
    "output_past",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    shape: StackShape
    num_encoder_layers: int
    inner_size: int
    is_gated: bool
    norm_eps: float
    num_buckets: int
    max_distance: int
    output_scale: float  # of hidden states before the head


def _read(fields: ConfigFields) -> T5Config:
    projection = fields.text("feed_forward_proj", "relu")
    if projection not in ("relu", "gated-gelu"):
        fields.refuse("feed_forward_proj", "relu and gated-gelu are computed")
    num_layers = fields.integer("num_layers")
    hidden_size = fields.integer("d_model")
    # Files written by older programs say by an untied head that there is no scale.
    scaled = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
    num_buckets = fields.integer("relative_attention_num_buckets", 32)
    if num_buckets % 4:
        fields.refuse("relative_attention_num_buckets", "must be a multiple of 4: halves by side, and by exactness")
    max_distance = fields.integer("relative_attention_max_distance", 128)
    if max_distance <= num_buckets // 2:
        fields.refuse("relative_attention_max_distance", f"must be over half of {num_buckets} buckets")
    config = T5Config(
        shape=StackShape(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_heads=fields.integer("num_heads"),
            head_dim=fields.integer("d_kv"),
            num_decoder_layers=fields.integer("num_decoder_layers", num_layers),
            scale=1.0,
            max_positions=_MAX_POSITIONS,
        ),
        num_encoder_layers=num_layers,
        inner_size=fields.integer("d_ff"),
        is_gated=projection == "gated-gelu",
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        num_buckets=num_buckets,
        max_distance=max_distance,
        output_scale=hidden_size**-0.5 if scaled else 1.0,
    )
    fields.close(_UNUSED, has_encoder=True)
    return config


class Stream(NamedTuple):
    """The residual stream between two parts."""

    x: Tensor  # [T, d]
    delta: Tensor | None = None  # [T, d], not added yet: whoever norms the sum does it


class T5Part(nn.Module):
    """One of the two or three parts of a block: a norm, then what is added to the residual stream."""

    def __init__(self, name: str, part: nn.Module, config: T5Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.add_module(name, part)
        self.part = (part,)  # in a tuple: registered once, under the name of the checkpoints
        self.layer_norm = RmsNorm(config.shape.hidden_size, config.norm_eps, dtype=dtype)

    def enter(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The stream, nothing left to add, and its norm."""
        return _normed(stream, self.layer_norm)


def _normed(stream: Stream, norm: RmsNorm) -> tuple[Tensor, Tensor]:
    return (stream.x, norm(stream.x)) if stream.delta is None else norm.of_sum(stream.x, stream.delta)


class T5Attention(T5Part):
    def __init__(self, name: str, config: T5Config, dtype: torch.dtype, *, has_bias: bool = False) -> None:
        shape = config.shape
        self_shape = HeadShape(shape.hidden_size, shape.num_heads, shape.head_dim, bias=False)
        attention = HeadedAttention(_NAMES, self_shape, dtype)
        if has_bias:
            table = Embedding(config.num_buckets, shape.num_heads, partition=Partition.ROW, dtype=dtype)
            attention.add_module("relative_attention_bias", table)
        super().__init__(name, attention, config, dtype)
        self.attention = (attention,)

    def encode(self, stream: Stream, step: EncoderAttention) -> Stream:
        x, normed = self.enter(stream)
        return Stream(x, self.attention[0].encode(normed, step))

    def decode(self, layer: int, stream: Stream, step: AttentionStep) -> Stream:
        x, normed = self.enter(stream)
        return Stream(x, self.attention[0].decode(layer, normed, step))

    def read(self, layer: int, stream: Stream, step: CrossAttention) -> Stream:
        x, normed = self.enter(stream)
        return Stream(x, self.attention[0].read(layer, normed, step))

    def keep(self, layer: int, states: Tensor, writer: CrossKeys) -> None:
        self.attention[0].keep(layer, states, writer)


class T5FeedForward(T5Part):
    def __init__(self, config: T5Config, dtype: torch.dtype) -> None:
        names = ("wi_0", "wi_1") if config.is_gated else ("wi",)
        activation = ACTIVATIONS["gelu_new" if config.is_gated else "relu"]
        sizes = (config.shape.hidden_size, config.inner_size)
        inner = FeedForward(names, "wo", sizes, activation, bias=False, dtype=dtype)
        super().__init__("DenseReluDense", inner, config, dtype)

    def forward(self, stream: Stream) -> Stream:
        x, normed = self.enter(stream)
        return Stream(x, self.part[0](normed))


class T5Block(nn.Module):
    """Self-attention, attention to the encoder in a decoder, feed-forward."""

    def __init__(self, index: int, config: T5Config, dtype: torch.dtype, *, is_decoder: bool) -> None:
        super().__init__()
        self.own = (T5Attention("SelfAttention", config, dtype, has_bias=index == 0),)
        self.cross: tuple[T5Attention, ...] = ()
        if is_decoder:
            self.cross = (T5Attention("EncDecAttention", config, dtype),)
        self.feed_forward = (T5FeedForward(config, dtype),)
        self.layer = nn.ModuleList([*self.own, *self.cross, *self.feed_forward])


class T5Stack(nn.Module):
    def __init__(self, num_layers: int, config: T5Config, dtype: torch.dtype, *, is_decoder: bool) -> None:
        super().__init__()
        self.blocks = tuple(T5Block(index, config, dtype, is_decoder=is_decoder) for index in range(num_layers))
        self.block = nn.ModuleList(self.blocks)
        self.final_layer_norm = RmsNorm(config.shape.hidden_size, config.norm_eps, dtype=dtype)

    def end(self, stream: Stream) -> Tensor:
        return _normed(stream, self.final_layer_norm)[1]

    @property
    def bias_table(self) -> Tensor:
        """[num_buckets, H]: the first layer's, added in all."""
        return self.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")


class T5ForConditionalGeneration(EncoderDecoderModel):
    def __init__(self, config: T5Config, spec: ModelSpec) -> None:
        super().__init__(config.shape, spec)
        self.config = config
        shape, dtype = config.shape, spec.torch_dtype
        self.shared = Embedding(shape.vocab_size, shape.hidden_size, dtype=dtype)
        self.encoder = T5Stack(config.num_encoder_layers, config, dtype, is_decoder=False)
        self.decoder = T5Stack(shape.num_decoder_layers, config, dtype, is_decoder=True)
        self.lm_head = BlockedLinear(shape.hidden_size, shape.vocab_size, partition=Partition.COLUMN, dtype=dtype)

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
        config = _read(fields)
        if dtype == "float16":
            raise CheckpointError(
                f"{fields.path}: dtype = {dtype!r}; T5's activations pass what float16 can hold; set model.dtype to "
                "bfloat16 or float32"
            )
        spec = model_spec(
            fields,
            config.shape,
            forced,
            architecture=architecture,
            dtype=dtype,
            eos_token_ids=eos_token_ids,
            dropped_prefixes=_DROPPED,
            stand_ins=(("lm_head.weight", "shared.weight"),),
        )
        return cls(config, spec)

    def _run_encoder(self, input_ids: Tensor, batch: EncoderBatch, backend: EncoderDecoderBackend) -> Tensor:
        bias = bidirectional_bias(self.encoder.bias_table, batch.longest, self.config.max_distance)
        step = backend.encoder(batch, self.config.shape.scale, bias)
        stream = Stream(self.shared(input_ids))
        for block in self.encoder.blocks:
            stream = block.own[0].encode(stream, step)
            stream = block.feed_forward[0](stream)
        return self.encoder.end(stream)

    def _keep(self, states: Tensor, writer: CrossKeys) -> None:
        for layer, block in enumerate(self.decoder.blocks):
            block.cross[0].keep(layer, states, writer)

    def _decoder_bias(self, longest: int) -> Tensor:
        return causal_bias(self.decoder.bias_table, longest, self.config.max_distance)

    def _run_decoder(self, input_ids: Tensor, positions: Tensor, step: AttentionStep, cross: CrossAttention) -> Tensor:
        stream = Stream(self.shared(input_ids))
        for layer, block in enumerate(self.decoder.blocks):
            stream = block.own[0].decode(layer, stream, step)
            stream = block.cross[0].read(layer, stream, cross)
            stream = block.feed_forward[0](stream)
        return self.decoder.end(stream)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden * self.config.output_scale)
