"""What every causal model offers, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvtransfer.layout import GroupSpec
from workers.attention.environment import Environment
from workers.attention.interface import AttentionBatch, AttentionProblem, KvCache
from workers.attention.mla_interface import MlaProblem
from workers.attention.resolver import Choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """Of a model whose decoder reads the output of an encoder."""

    max_source_tokens: int
    decoder_start_token_id: int  # what a decoder prompt begins with, unless it is given whole
    forced_bos_token_id: int | None  # the decoder's second token, whatever it would have drawn
    forced_eos_token_id: int | None  # its last one, where the length ends it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the rest of a worker needs to know about a model."""

    architecture: str  # config.json's name, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str  # of weights and activations: a key of DTYPES
    rope_convention: str  # of cached keys: "interleaved", "half_split", "none"
    dropped_prefixes: tuple[str, ...] = ()  # tensors that checkpoints hold and this model does not compute with
    # Parameters that checkpoints may leave out, and the stored tensor that stands in for each; None: zeros.
    stand_ins: tuple[tuple[str, str | None], ...] = ()
    encoder: EncoderSpec | None = None  # None: a decoder alone

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class CausalModel(Protocol):
    """One rank's share of a decoder. Forward and logits run on the engine's thread, without gradients."""

    @property
    def spec(self) -> ModelSpec: ...

    def kv_groups(self, block_size: int) -> tuple[GroupSpec, ...]:
        """The logical, unsharded KV of the model."""
        ...

    def attention_problem(self, block_size: int) -> AttentionProblem | MlaProblem:
        """What its attention asks of a backend, with blocks of that size."""
        ...

    def bind_kv(self, caches: Sequence[KvCache], environment: Environment | None = None) -> Choice:
        """One cache per group of `kv_groups`, with that block size. Called before the first forward, and again for
        other caches.

        Returns which attention backend was chosen and why, for the log. The environment is probed when not given.
        Raises ConfigError when no backend computes this model here.
        """
        ...

    def forward(self, input_ids: Tensor, batch: AttentionBatch, capture_layers: Sequence[int] = ()) -> Tensor:
        """input_ids [T] int64 -> hidden states after the final norm [T, d], or, where the batch says that nobody reads
        others, those of its `logits_rows` [N, d]; writes the KV of all T tokens.

        With n `capture_layers` the result is [T, (1 + n) * d]: the residual stream that enters each of these layers
        is appended, in the order asked (num_layers: what leaves the last one).
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N, vocab_size], in the model's dtype."""
        ...
