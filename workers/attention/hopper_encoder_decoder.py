"""The kernels of encoder–decoder attention on SM90. Reference: TorchKernels of workers.attention.packed."""

from __future__ import annotations

from torch import Tensor

from workers.attention.packed import Blocks, Spans
from workers.kernels.head_pages import write_heads
from workers.kernels.packed_attention import packed_attention, paged_attention
from workers.kernels.paged_decode import paged_decode
from workers.kernels.tactics import decode_tactic


class HopperKernels:
    """See `Kernels`. Launches are the same at every length, but for the number of tiles."""

    def write(self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, layer: int) -> None:
        write_heads(k, v, pages, slots, layer)

    def attend_singles(
        self, q: Tensor, blocks: Blocks, last: Tensor, layer: int, scale: float, bias: Tensor | None
    ) -> Tensor:
        tactic = decode_tactic(len(blocks.table) * blocks.pages.shape[3])
        return paged_decode(q, blocks.pages, blocks.table, last, layer, scale, tactic, bias)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, bias: Tensor | None, out: Tensor
    ) -> None:
        packed_attention(q, k, v, *spans, scale, bias, out)

    def attend_blocks(
        self,
        q: Tensor,
        blocks: Blocks,
        layer: int,
        spans: Spans,
        scale: float,
        bias: Tensor | None,
        out: Tensor,
        *,
        causal: bool,
    ) -> None:
        paged_attention(q, blocks.pages, blocks.table, layer, *spans, scale, bias, out, causal=causal)
