"""What T5, BART and mBART share: two stacks, two KV groups, and how the rest of a worker calls them.

Group 0, "self", grows with the decoder's tokens. Group 1, "cross", holds the keys and values that every decoder layer
makes of the encoder's output: as many tokens as the encoder read, written once. Where encoders hand over their hidden
states, it holds these beside them: they travel, and each worker makes the keys and values itself.

Shapes: T decoder tokens, S packed encoder tokens, N rows with logits, d hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from cluster.config import EncoderOutput
from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.encoder_decoder import ReferenceBackend
from workers.attention.environment import Environment
from workers.attention.interface import (
    AttentionBatch,
    AttentionProblem,
    AttentionStep,
    CrossAttention,
    CrossKeys,
    EncoderBatch,
    EncoderDecoderBackend,
    KvCache,
)
from workers.attention.resolver import HOPPER, Choice, build_encoder_decoder, resolve
from workers.layers.blocked_linear import block_all
from workers.layers.encoder_decoder import FeedForward, HeadedAttention
from workers.layers.norm import LayerNorm, RmsNorm
from workers.models.fields import ConfigFields
from workers.models.model import EncoderSpec, ModelSpec

REGION, STATES = "kv", "states"
SELF, CROSS = "self", "cross"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackShape:
    """What both stacks are sized by."""

    vocab_size: int
    hidden_size: int
    num_heads: int  # of the decoder
    head_dim: int
    num_decoder_layers: int
    scale: float  # of the decoder's scores
    max_positions: int  # of either stack


class ForcedTokens(NamedTuple):
    """What config.json or generation_config.json forces into every output; see EncoderSpec."""

    decoder_start_token_id: int | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None


FORCED_KEYS = ForcedTokens._fields


class EncoderDecoderModel(nn.Module, ABC):
    """See `CausalModel`: forward and logits are those of the decoder. Base of the families."""

    def __init__(self, shape: StackShape, spec: ModelSpec) -> None:
        super().__init__()
        self._shape = shape
        self.spec = spec
        self._caches: Sequence[KvCache] = ()
        self._backend: EncoderDecoderBackend | None = None
        self._whole_bias: Tensor | None = None  # [H, max_positions], where a backend wants it

    # ------------------------------------------------------------------ what a family adds

    @classmethod
    @abstractmethod
    def from_fields(
        cls,
        fields: ConfigFields,
        *,
        architecture: str,
        dtype: str,
        eos_token_ids: tuple[int, ...],
        forced: ForcedTokens,
    ) -> Self:
        """See `DecoderForCausalLM.from_fields`."""

    @abstractmethod
    def _run_encoder(self, input_ids: Tensor, batch: EncoderBatch, backend: EncoderDecoderBackend) -> Tensor:
        """[S] -> [S, d], after the last norm."""

    @abstractmethod
    def _keep(self, states: Tensor, writer: CrossKeys) -> None:
        """Writes the keys and values of every decoder layer."""

    @abstractmethod
    def _run_decoder(self, input_ids: Tensor, positions: Tensor, step: AttentionStep, cross: CrossAttention) -> Tensor:
        """[T] -> [T, d], after the last norm."""

    @abstractmethod
    def _logits(self, hidden: Tensor) -> Tensor: ...

    def _decoder_bias(self, longest: int) -> Tensor | None:
        """[H, longest]: see ReferenceAttention.begin."""
        return None

    # ------------------------------------------------------------------ what everybody calls

    def kv_groups(self, block_size: int, encoder_output: EncoderOutput = "cross_kv") -> tuple[GroupSpec, ...]:
        region = RegionSpec(
            name=REGION,
            num_layers=self._shape.num_decoder_layers,
            page_format=PageFormat.KV_HEADS_FIRST,
            dtype=self.spec.dtype,
            block_size=block_size,
            kv_heads=self._shape.num_heads,
            head_dim=self._shape.head_dim,
        )
        cross: tuple[RegionSpec, ...] = (region,)
        if encoder_output == "hidden_states":
            states = RegionSpec(
                name=STATES,
                num_layers=1,
                page_format=PageFormat.ROWS,
                dtype=self.spec.dtype,
                block_size=block_size,
                row_size=self.spec.hidden_size,
            )
            cross = (replace(region, travels=False), states)
        return (GroupSpec(SELF, block_size, (region,)), GroupSpec(CROSS, block_size, cross))

    def attention_problem(self, block_size: int) -> AttentionProblem:
        return AttentionProblem(
            kind="encoder_decoder",
            num_heads=self._shape.num_heads,
            num_kv_heads=self._shape.num_heads,
            head_dim=self._shape.head_dim,
            block_size=block_size,
            dtype=self.spec.torch_dtype,
            scale=self._shape.scale,
        )

    def bind_kv(
        self,
        caches: Sequence[KvCache],
        environment: Environment | None = None,
        *,
        backend: EncoderDecoderBackend | None = None,
    ) -> Choice:
        """`backend` computes instead of the chosen one, if given."""
        own, _ = self._caches = tuple(caches)
        pages = own.pages(REGION)
        problem = self.attention_problem(pages.shape[-2])
        choice = resolve(problem, environment or Environment.probe(pages.device))
        if choice.chosen == HOPPER and backend is None:
            for module in self.modules():
                if isinstance(module, (FeedForward, HeadedAttention, LayerNorm, RmsNorm)):
                    module.fuse()
        block_all(self, but="encoder")  # whose rounding every later token sees, and whose batches are long anyhow
        self._backend = backend or build_encoder_decoder(choice, problem, pages.device)
        self._whole_bias = self._decoder_bias(self._shape.max_positions) if self._backend.reads_device_lens else None
        return choice

    @torch.inference_mode()
    def encode(self, input_ids: Tensor, batch: EncoderBatch) -> Tensor:
        """Packed encoder inputs [S] int64 -> the encoder's output [S, d]. Writes nothing.

        Raises ValueError when the lengths do not fit.
        """
        if len(input_ids) != batch.num_tokens:
            raise ValueError(f"{len(input_ids)} encoder tokens for lengths of {batch.lens}")
        backend = self._backend or ReferenceBackend(self.attention_problem(1), in_place=False)  # needs no cache
        return self._run_encoder(input_ids, batch, backend)

    @torch.inference_mode()
    def keep(self, states: Tensor, batch: EncoderBatch) -> None:
        """The encoder's output [S, d] -> into the blocks of group 1 that the batch names: keys and values of all
        decoder layers, or the states themselves, of which `project` makes them."""
        if STATES in self._caches[1].regions:
            self._kept_states()[batch.slot_mapping] = states
        else:
            self._keep(states, self._writer(batch))

    @torch.inference_mode()
    def project(self, batch: EncoderBatch) -> None:
        """Keys and values of all decoder layers, from the states that lie in the same slots of group 1."""
        self._keep(self._kept_states()[batch.slot_mapping], self._writer(batch))

    def _writer(self, batch: EncoderBatch) -> CrossKeys:
        assert self._backend is not None, "bind_kv comes before anything is kept"
        return self._backend.writer(batch, self._caches[1], REGION)

    def _kept_states(self) -> Tensor:
        """[slots, d], sharing memory."""
        return self._caches[1].pages(STATES).view(-1, self.spec.hidden_size)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        assert not capture_layers, "no draft head reads these models"
        assert self._backend is not None, "bind_kv comes before the first forward"
        (fixed,) = batch.fixed
        bias = self._whole_bias
        if not self._backend.reads_device_lens:
            bias = self._decoder_bias(max(batch.context_lens, default=1))
        step = self._backend.own(batch, 0, self._caches[0], REGION, bias)
        cross = self._backend.cross(batch, fixed, self._caches[1], REGION)
        return self._run_decoder(input_ids, batch.positions, step, cross)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden)


def model_spec(
    fields: ConfigFields,
    shape: StackShape,
    forced: ForcedTokens,
    *,
    architecture: str,
    dtype: str,
    eos_token_ids: tuple[int, ...],
    dropped_prefixes: tuple[str, ...],
    stand_ins: tuple[tuple[str, str | None], ...],
) -> ModelSpec:
    """What all families say alike. Raises CheckpointError where nothing says what a decoder begins with."""
    start = forced.decoder_start_token_id
    if start is None:
        fields.refuse("decoder_start_token_id", "a decoder begins with it; add it, as generation_config.json may, too")
    return ModelSpec(
        architecture=architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_decoder_layers,
        max_position_embeddings=shape.max_positions,
        eos_token_ids=eos_token_ids,
        dtype=dtype,
        rope_convention="none",
        dropped_prefixes=dropped_prefixes,
        stand_ins=stand_ins,
        encoder=EncoderSpec(
            max_source_tokens=shape.max_positions,
            decoder_start_token_id=start,
            forced_bos_token_id=forced.forced_bos_token_id,
            forced_eos_token_id=forced.forced_eos_token_id,
        ),
    )
