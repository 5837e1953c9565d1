"""What all decoders share: embedding, layers around a residual stream, final norm, head. Parameter names are those
of the checkpoints. A family adds its config, its attention and the geometry of its cache.

Shapes: T tokens, N rows with logits, d hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from cluster.log import Log
from kvtransfer.layout import GroupSpec
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch, AttentionStep, KvCache
from workers.attention.mla_interface import MlaStep
from workers.attention.resolver import HOPPER, Choice
from workers.layers.linear import Embedding, Linear, Partition
from workers.layers.mlp import GatedMlp
from workers.layers.moe import ExpertShape, SparseMlp
from workers.layers.norm import RmsNorm
from workers.layers.rotary import RotaryEmbedding, Rotation
from workers.models.fields import ConfigFields
from workers.models.model import ModelSpec
from workers.models.rope import Rope

if TYPE_CHECKING:
    from workers.attention.hopper_dsa import HopperDsaStep
    from workers.attention.hopper_gqa import HopperGqaStep
    from workers.attention.hopper_mla import HopperMlaStep
    from workers.models.fused_decoder import FusedDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """What the maths needs of config.json outside attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    sparse_layers: tuple[bool, ...]  # per layer: experts, or one dense feed-forward
    experts: ExpertShape | None  # of the sparse layers
    mlp_bias: bool  # of the dense ones
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    tied: bool  # the head is the embedding
    num_draft_layers: int = 0  # stored behind the others, and not computed

    @property
    def num_layers(self) -> int:
        return len(self.sparse_layers)


class DecoderConfig(Protocol):
    @property
    def decoder(self) -> DecoderShape: ...


class DecoderLayer(nn.Module):
    """Pre-norm: attention, then a feed-forward, each added to the residual stream."""

    def __init__(self, index: int, shape: DecoderShape, attention: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        d = shape.hidden_size
        self.input_layernorm = RmsNorm(d, shape.norm_eps, dtype=dtype)
        self.self_attn = attention
        self.post_attention_layernorm = RmsNorm(d, shape.norm_eps, dtype=dtype)
        if shape.sparse_layers[index]:
            assert shape.experts is not None, "a sparse layer without a shape of its experts"
            self.mlp = SparseMlp(d, shape.experts, dtype=dtype)
        else:
            self.mlp = GatedMlp(d, shape.intermediate_size, dtype=dtype, bias=shape.mlp_bias)

    def forward(self, x: Tensor, rotation: Rotation, step: AttentionStep | MlaStep) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The part that checkpoints call `model`."""

    def __init__(
        self, shape: DecoderShape, layer_of: Callable[[int], nn.Module], rotated_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(layer_of(index) for index in range(shape.num_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.norm_eps, dtype=dtype)
        self.rotary = RotaryEmbedding(rotated_size, shape.rope.theta, shape.rope.scaling)

    def forward(
        self, input_ids: Tensor, positions: Tensor, step: AttentionStep | MlaStep, capture: Sequence[int]
    ) -> Tensor:
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


ConfigT = TypeVar("ConfigT", bound=DecoderConfig)


class DecoderForCausalLM(nn.Module, Generic[ConfigT]):
    """See `CausalModel`. `config` is what was read of config.json."""

    rope_convention: ClassVar[str]  # of cached keys

    def __init__(self, config: ConfigT, spec: ModelSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        shape, dtype = config.decoder, spec.torch_dtype
        self.model = Decoder(
            shape,
            lambda index: DecoderLayer(index, shape, self._attention(index, dtype), dtype),
            self._rotated_size(),
            dtype,
        )
        self._fused: FusedDecoder | None = None  # takes the place of `model` where it runs
        if not shape.tied:
            self.lm_head = Linear(shape.hidden_size, shape.vocab_size, partition=Partition.COLUMN, dtype=dtype)

    @classmethod
    def from_fields(
        cls, fields: ConfigFields, *, architecture: str, dtype: str, eos_token_ids: tuple[int, ...]
    ) -> Self:
        """Parameters lie on torch's default device; the loader makes them on "meta" and fills them.

        Raises CheckpointError for what is missing, malformed or not computed here.
        """
        config = cls.read(fields)
        shape = config.decoder
        drafts = range(shape.num_layers, shape.num_layers + shape.num_draft_layers)
        spec = ModelSpec(
            architecture=architecture,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            max_position_embeddings=shape.max_position_embeddings,
            eos_token_ids=eos_token_ids,
            dtype=dtype,
            rope_convention=cls.rope_convention,
            dropped_prefixes=tuple(f"model.layers.{index}." for index in drafts),
        )
        return cls(config, spec)

    @classmethod
    @abstractmethod
    def read(cls, fields: ConfigFields) -> ConfigT:
        """Closes the fields. Raises CheckpointError for what is missing, malformed or not computed here."""

    @abstractmethod
    def _attention(self, index: int, dtype: torch.dtype) -> nn.Module:
        """Of one layer; called with (x [T, d], rotation, step) -> [T, d]."""

    @abstractmethod
    def _rotated_size(self) -> int:
        """Features of a query that are rotated."""

    @abstractmethod
    def _begin(
        self, batch: AttentionBatch
    ) -> AttentionStep | MlaStep | HopperGqaStep | HopperMlaStep | HopperDsaStep: ...

    @abstractmethod
    def kv_groups(self, block_size: int) -> tuple[GroupSpec, ...]: ...

    @abstractmethod
    def bind_kv(self, caches: Sequence[KvCache], environment: Environment | None = None) -> Choice: ...

    @property
    def fused(self) -> FusedDecoder | None:
        return self._fused

    def _fuse(self, choice: Choice) -> None:
        """Packs the weights, once, for the backend that has more than attention to offer."""
        if choice.chosen == HOPPER and self._fused is None:
            from workers.kernels.tactic_table import DeviceSetting, TacticTable
            from workers.models.fused_decoder import FusedDecoder

            tactics = TacticTable.tuned(DeviceSetting.of(self.model.embed_tokens.weight.device))
            self._fused = FusedDecoder(self.model, self.spec.max_position_embeddings, tactics)
            Log(logging.getLogger("sluice.models")).info("kernel tactics", reason=tactics.source)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        step = self._begin(batch)
        if self._fused is not None:
            return self._fused.forward(input_ids, step, capture_layers, batch.rows_read())
        return self.model(input_ids, batch.positions, step, capture_layers)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        if self._fused is not None:
            head = self.model.embed_tokens if self.config.decoder.tied else self.lm_head
            return self._fused.logits(hidden, head.weight)
        return self.model.embed_tokens.project(hidden) if self.config.decoder.tied else self.lm_head(hidden)
