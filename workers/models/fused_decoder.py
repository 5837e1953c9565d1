"""A decoder of few launches, for SM90, over the weights of a `Decoder`. Its reference is that decoder.

Shapes: T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from workers.attention.hopper_dsa import HopperDsaStep
from workers.attention.hopper_gqa import HopperGqaStep
from workers.attention.hopper_mla import HopperMlaStep
from workers.attention.interface import AttentionStep
from workers.attention.mla_interface import MlaStep
from workers.kernels.dense_gemm import dense
from workers.kernels.fp8_rows import QuantizedRows
from workers.kernels.norms import ExpertOutputs, add_rms_norm, finalize_rms_norm, rms_norm, rms_norm_quantized
from workers.kernels.rotary import RotationTable
from workers.kernels.skinny_gemm import skinny_linear
from workers.kernels.tactic_table import RULES, TacticTable
from workers.kernels.tactics import SKINNY_ROWS
from workers.layers.attention import GroupedQueryAttention
from workers.layers.fused_attention import FusedGqa, FusedMla
from workers.layers.fused_mlp import FusedExperts, FusedMlp
from workers.layers.fused_sparse_attention import FusedDsa
from workers.layers.linear import Linear
from workers.layers.mla import LatentAttention
from workers.layers.moe import SparseMlp
from workers.layers.norm import RmsNorm
from workers.models.decoder import Decoder, DecoderLayer

HopperStep: TypeAlias = HopperGqaStep | HopperMlaStep | HopperDsaStep


class FusedDecoder:
    """Packs the weights of `decoder`, layer by layer; the decoder goes on to work with views of them."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, num_positions: int, tactics: TacticTable = RULES) -> None:
        self._tactics = tactics
        self._embed = decoder.embed_tokens
        self._norm = decoder.norm
        self.layers = [_FusedLayer(layer, tactics) for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        self._absorbed = all(layer.is_plain for layer in self.layers)
        if self._absorbed:
            for layer in self.layers:
                layer.absorb_norms()
        device = decoder.embed_tokens.weight.device
        rotation = decoder.rotary.rotation(torch.arange(num_positions, device=device), torch.float32)
        self._rotation = RotationTable(rotation.cos.flatten(1).contiguous(), rotation.sin.flatten(1).contiguous())

    def forward(
        self,
        input_ids: Tensor,
        step: AttentionStep | MlaStep | HopperStep,
        capture: Sequence[int],
        rows: Tensor | None = None,
    ) -> Tensor:
        """rows [N] int64: those of T whose hidden states are read. What is behind attention in the last layer is not
        computed of others. -> [N, d] in their order; without them, or if layers are captured, [T, …].
        """
        assert isinstance(step, HopperStep), "fused layers run on the backend they were made for"
        absorbed = self._absorbed and len(input_ids) > SKINNY_ROWS
        run = self._run_absorbed if absorbed else self._run
        normed, entering = run(self._embed(input_ids), step, capture, None if capture else rows)
        return torch.cat([normed, *(entering[index] for index in capture)], -1) if capture else normed

    def _run(
        self, x: Tensor, step: HopperStep, capture: Sequence[int], rows: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x [T, d] -> what leaves the last norm, and what enters the layers that are captured, or leaves the last."""
        delta: Tensor | ExpertOutputs | None = None
        entering: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            x, normed, quantized = _enter(x, delta, layer.input_norm, layer.attends_in_fp8)
            if index in capture:
                entering[index] = x
            read = rows if layer is self.layers[-1] else None
            delta, slots = layer.attend(normed, self._rotation, step, quantized, read), step.slots
            if read is not None:
                if not len(read):
                    return normed[:0], entering
                x, slots = x[read], slots[read]
            x, normed, quantized = _enter(x, delta, layer.mlp_norm, layer.mlp.in_fp8)
            delta = layer.mlp(normed, slots, quantized)
        x, normed, _ = _enter(x, delta, self._norm, False)
        return normed, entering | {len(self.layers): x}

    def _run_absorbed(
        self, x: Tensor, step: HopperStep, capture: Sequence[int], rows: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `_run`. What a layer adds its products add, and no norm but the last is written."""
        assert isinstance(step, HopperGqaStep), "absorbed by layers of that kind"
        entering: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if index in capture:
                entering[index] = x.clone()
            x = layer.add_to(x, self._rotation, step, rows if layer is self.layers[-1] else None)
        normed = rms_norm(x, self._norm.weight, self._norm.eps) if len(x) else x
        return normed, entering | {len(self.layers): x}

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [N, d], the head's weight [V, d] -> [N, V]."""
        if len(hidden) > SKINNY_ROWS or not hidden.is_contiguous():
            return dense(hidden, weight, self._tactics.dense(len(hidden), weight.shape))
        return skinny_linear(hidden, weight, self._tactics.skinny(weight.shape, gated=False))


class _FusedLayer:
    def __init__(self, layer: DecoderLayer, tactics: TacticTable) -> None:
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.mlp = (
            FusedExperts(layer.mlp, tactics) if isinstance(layer.mlp, SparseMlp) else FusedMlp(layer.mlp, tactics)
        )
        attention = layer.self_attn
        self._gqa = FusedGqa(attention, tactics) if isinstance(attention, GroupedQueryAttention) else None
        latent = attention if isinstance(attention, LatentAttention) else None
        if latent is not None and latent.indexer is not None:
            for linear in latent.modules():  # its layers compute in bf16
                if isinstance(linear, Linear):
                    linear.widen()
        self._dsa = FusedDsa(latent) if latent is not None and latent.indexer is not None else None
        self._mla = FusedMla(latent, tactics=tactics) if latent is not None and latent.indexer is None else None

    @property
    def is_plain(self) -> bool:
        """Whether `absorb_norms` and `add_to` can be."""
        return self._gqa is not None and self._gqa.is_plain and isinstance(self.mlp, FusedMlp) and self.mlp.is_plain

    def absorb_norms(self) -> None:
        """Their weights become part of the matrices behind them, and are ones from then on."""
        assert self._gqa is not None and isinstance(self.mlp, FusedMlp), "of a plain layer"
        for part, norm in ((self._gqa, self.input_norm), (self.mlp, self.mlp_norm)):
            part.absorb(norm.weight)
            norm.weight.fill_(1)

    def add_to(self, x: Tensor, rotation: RotationTable, step: HopperGqaStep, read: Tensor | None) -> Tensor:
        """x [T, d], behind `absorb_norms`: what it adds is added there; [N, d] of the rows `read` [N] are new."""
        assert self._gqa is not None and isinstance(self.mlp, FusedMlp), "of a plain layer"
        x = self._gqa.add_to(x, self.input_norm.eps, rotation, step, read)
        self.mlp.add_to(x, self.mlp_norm)
        return x

    @property
    def attends_in_fp8(self) -> bool:
        attention = self._gqa or self._mla
        return attention is not None and attention.in_fp8

    def attend(
        self,
        x: Tensor,
        rotation: RotationTable,
        step: HopperStep,
        quantized: QuantizedRows | None,
        read: Tensor | None,
    ) -> Tensor:
        """[T, d] -> [T, d], or [N, d] of the rows that are `read` [N]."""
        if self._gqa is not None and isinstance(step, HopperGqaStep):
            return self._gqa(x, rotation, step, quantized, read)
        if self._dsa is not None and isinstance(step, HopperDsaStep):
            return self._dsa(x, rotation, step, read)
        assert self._mla is not None and isinstance(step, HopperMlaStep), "the step belongs to another kind of model"
        return self._mla(x, rotation, step, quantized, read)


def _enter(
    x: Tensor, delta: Tensor | ExpertOutputs | None, norm: RmsNorm, in_fp8: bool
) -> tuple[Tensor, Tensor, QuantizedRows | None]:
    """What enters a part of a layer, its norm, and that in fp8 where it is of use."""
    if isinstance(delta, ExpertOutputs):
        return finalize_rms_norm(x, delta, norm.weight, norm.eps, quantize=in_fp8)
    if in_fp8:
        return rms_norm_quantized(x, delta, norm.weight, norm.eps)
    if delta is None:
        return x, rms_norm(x, norm.weight, norm.eps), None
    return *add_rms_norm(x, delta, norm.weight, norm.eps), None
