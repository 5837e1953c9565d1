"""Attention layers of few launches, for SM90. References: GroupedQueryAttention and LatentAttention.

Shapes: T tokens, A of them single (the first rows), n of prompts, d hidden, H heads, N unrotated and R rotated
query/key features, V value size, L latent size, C cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.hopper_gqa import HopperGqaStep
from workers.attention.hopper_mla import HopperMlaStep
from workers.kernels.fp8_rows import QuantizedRows
from workers.kernels.latent_entry import ENDS_ROWS, enter_latents
from workers.kernels.latent_exit import leave_latents
from workers.kernels.norms import PendingNorm, rms_norm
from workers.kernels.rotary import RotationTable, join_keys
from workers.kernels.split_merge import merge_rows
from workers.kernels.tactic_table import RULES, TacticTable
from workers.layers.attention import GroupedQueryAttention
from workers.layers.linear import Linear
from workers.layers.mla import LatentAttention
from workers.layers.packed_weights import PackedLinear

# In latent space: queries [A, H, L] and their rotated part [A, H, R] -> what they see, [A, H, L].
Attend: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def project_read(out: PackedLinear | Linear, seen: Tensor, read: Tensor | None = None) -> Tensor:
    """What was seen [T, H V] -> [T, d], or [N, d] of the rows that are read [N]; of none nothing is launched."""
    rows = seen if read is None else seen[read]
    return out(rows) if len(rows) else rows.new_empty(0, out.weight.shape[0])


class FusedGqa:
    """x [T, d] -> [T, d]: one projection, one pass for norms, rotation and cache, attention, one projection."""

    def __init__(self, attention: GroupedQueryAttention, tactics: TacticTable = RULES) -> None:
        self._layer = attention.layer
        self._qkv = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj], tactics)
        self._out = PackedLinear([attention.o_proj], tactics)
        self._norms = None
        if attention.q_norm is not None and attention.k_norm is not None:
            self._norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)

    @property
    def in_fp8(self) -> bool:
        """Whether it has a use for x in fp8."""
        return self._qkv.scales is not None

    def __call__(
        self,
        x: Tensor,
        rotation: RotationTable,
        step: HopperGqaStep,
        quantized: QuantizedRows | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """read [N]: rows; if given, [N, d] of these."""
        qkv = self._qkv(x, quantized)
        return project_read(self._out, step.rotate_and_attend(self._layer, qkv, rotation, self._norms, read=read))

    @property
    def is_plain(self) -> bool:
        """Whether `absorb` and `add_to` can be."""
        return self._qkv.is_plain and self._out.is_plain

    def absorb(self, norm: Tensor) -> None:
        """The weights [d] of the norm of x become part of the matrix."""
        self._qkv.absorb(norm)

    def add_to(
        self, x: Tensor, eps: float, rotation: RotationTable, step: HopperGqaStep, read: Tensor | None
    ) -> Tensor:
        """x [T, d], whose norm has been absorbed: it is itself what is added to; [N, d] of the rows `read` are new."""
        seen = step.rotate_and_attend(self._layer, self._qkv(x), rotation, self._norms, PendingNorm(x, eps), read)
        if read is not None:
            x = x[read]
        self._out.add_to(x, seen)
        return x


class FusedMla:
    """x [T, d] -> [T, d]: what makes queries and latents is one product, norm, rotation and cache are one pass."""

    def __init__(self, attention: LatentAttention, extra: Sequence[Linear] = (), tactics: TacticTable = RULES) -> None:
        """extra: what else is projected from x, behind queries and latents."""
        self._layer = attention.layer
        self._tactics = tactics
        self._shape = attention.shape
        self._attention = attention
        queries = attention.q_proj if attention.shape.query_latent_size is None else attention.q_a_proj
        parts = [queries, attention.kv_a_proj_with_mqa, *extra]
        # Its halves multiply apart, and in latent space: products of bf16.
        attention.kv_b_proj.widen()
        self._first = PackedLinear(parts, tactics)
        self._sizes = [part.weight.shape[0] for part in parts]
        two_steps = attention.shape.query_latent_size is not None
        self._second = PackedLinear([attention.q_b_proj], tactics) if two_steps else None
        self._out = PackedLinear([attention.o_proj], tactics)

    @property
    def in_fp8(self) -> bool:
        """Whether it has a use for x in fp8."""
        return self._first.scales is not None

    def __call__(
        self,
        x: Tensor,
        rotation: RotationTable,
        step: HopperMlaStep,
        quantized: QuantizedRows | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """read [N]: rows; if given, [N, d] of these."""
        shape, attention = self._shape, self._attention
        queries, kv = self.project(x, quantized)
        if self._second is not None:
            norm = attention.q_a_layernorm
            queries = self._second(rms_norm(queries, norm.weight, norm.eps))
        q = queries.unflatten(-1, (-1, shape.nope_dim + shape.rope_dim))  # [T, H, N + R]
        singles = step.num_decodes
        absorbed = self.enter(q, kv, rotation, step.positions, step.pages, step.slots, singles)
        out = torch.empty(*q.shape[:2], shape.value_dim, dtype=x.dtype, device=x.device)
        if singles:
            self.generate(
                q[:singles],
                absorbed,
                out[:singles],
                lambda a, rope: step.decode(self._layer, a, rope, self._tactics),
            )
        if step.new is not None:
            self.forward_context(q[singles:], kv[singles:], out[singles:], step)
        return project_read(self._out, out.flatten(1), read)

    def project(self, x: Tensor, quantized: QuantizedRows | None = None) -> tuple[Tensor, ...]:
        """[T, d] -> of each projection its features, [T, …]."""
        return self._first(x, quantized).split(self._sizes, -1)

    def enter(
        self,
        q: Tensor,
        kv: Tensor,
        rotation: RotationTable,
        positions: Tensor,
        pages: Tensor,
        slots: Tensor,
        singles: int,
    ) -> Tensor | None:
        """q [T, H, N + R] and kv [T, L + R] become what is attended, in place, and what is cached. The queries of the
        first A = `singles` tokens in latent space, [A, H, L], where one pass makes them; see `enter_latents`."""
        norm = self._attention.kv_a_layernorm
        keys = self._attention.key_weights
        return enter_latents(
            q, kv, rotation, positions, norm.weight, norm.eps, pages, slots, self._layer, singles, keys
        )

    def generate(self, q: Tensor, absorbed: Tensor | None, out: Tensor, attend: Attend) -> None:
        """q [A, H, N + R], in latent space where `enter` brought it there -> out [A, H, V]: what is seen there, out of
        it again.
        """
        nope, rope = q.split([self._shape.nope_dim, self._shape.rope_dim], -1)
        value_weights = self._attention.value_weights
        if absorbed is None:
            absorbed = torch.bmm(nope.transpose(0, 1), self._attention.key_weights).transpose(0, 1)
        seen = attend(absorbed, rope)
        if len(q) <= ENDS_ROWS:
            leave_latents(seen, value_weights, out)
        else:
            torch.bmm(seen.transpose(0, 1), value_weights.transpose(1, 2), out=out.transpose(0, 1))

    def forward_context(self, q: Tensor, kv: Tensor, out: Tensor, step: HopperMlaStep) -> None:
        """The one way for tokens of prompts: new tokens first, then every cached piece.

        q [n, H, N + R] rotated, kv [n, L + R] as cached -> out [n, H, V].
        """
        assert step.new is not None, "no prompt in this step"
        k, v = self._expand(kv)
        if not step.pieces:
            step.new.attend(q, k, v, out)
            return
        part, lse = step.new.attend_part(q, k, v)
        total = part.float()
        for piece in step.pieces:
            k, v = self._expand(step.cached_rows(self._layer, piece))
            part, part_lse = piece.attention.attend_part(q.index_select(0, piece.queries), k, v)
            merge_rows(total, lse, piece.queries, part, part_lse)
        out.copy_(total)

    def _expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Latent rows [C, L + R] of any stride -> keys [C, H, N + R] and values [C, H, V], a view."""
        shape = self._shape
        latent, rope = rows.split([shape.latent_size, shape.rope_dim], -1)
        both = F.linear(latent, self._attention.kv_b_proj.weight)
        both = both.unflatten(-1, (-1, shape.nope_dim + shape.value_dim))
        return join_keys(both, rope, shape.nope_dim), both[..., shape.nope_dim :]
