"""Kernels of encoder–decoder attention on the GPU beside their references, at odd sizes: one row, ends of blocks, the
longest, a pool of more than 2^32 elements, and NaN behind the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.tensor_errors import error
from workers.attention.packed import Blocks, Spans, TorchKernels
from workers.kernels.tactics import DecodeTactic, decode_tactic

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BLOCK = 64


def slots(blocks: Tensor, count: int) -> Tensor:
    at = torch.arange(count, device=blocks.device)
    return blocks[at // BLOCK] * BLOCK + at % BLOCK


@pytest.mark.parametrize("tactic", [None, DecodeTactic(1, 32, 4, 2), DecodeTactic(16, 64, 8, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_single_queries_with_a_bias(tactic: DecodeTactic | None, *, with_bias: bool) -> None:
    """One row, the ends of blocks, a long one, rows that pad a step, and NaN behind the tokens."""
    from workers.kernels.paged_decode import paged_decode

    heads, dim, layers, layer, scale = 5, 64, 3, 2, 1.0 if with_bias else 0.125
    for lens in ([1], [1, 64, 65, 2, 700, 4097]):
        torch.manual_seed(0)
        pages = (0.5 * torch.randn(100, layers, 2, heads, BLOCK, dim, device=CUDA)).bfloat16()
        table = torch.zeros(len(lens) + 2, 66, dtype=torch.int64, device=CUDA)
        at = 1
        for row, length in enumerate(lens):
            count = -(-length // BLOCK)
            table[row, :count] = torch.arange(at, at + count, device=CUDA)
            at += count
            if length % BLOCK:
                pages[at - 1, :, :, :, length % BLOCK :] = float("nan")
        last = torch.tensor([*lens, 1, 1], device=CUDA) - 1
        bias = torch.randn(heads, 5000, device=CUDA).bfloat16() if with_bias else None
        q = torch.randn(len(last), heads, dim, device=CUDA).bfloat16()
        own = tactic or decode_tactic(len(last) * heads)
        out = paged_decode(q, pages, table, last, layer, scale, own, bias).view_as(q)
        wide = None if bias is None else bias.float()
        blocks = Blocks(pages.float(), table)
        want = TorchKernels().attend_singles(q.float(), blocks, last, layer, scale, wide).view_as(out)
        for row in range(len(last)):
            assert error(out[row], want[row]) < 6e-3, (lens, row)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lens", [[1], [5, 64, 1, 65, 130], [700, 3, 512]])
def test_packed_attention(lens: list[int], *, with_bias: bool) -> None:
    """Rows of a packed product, and a bias that is wider than the longest needs."""
    from workers.kernels.packed_attention import packed_attention

    torch.manual_seed(0)
    heads, dim, scale = 5, 64, 1.0 if with_bias else 0.125
    q, k, v = (0.5 * torch.randn(sum(lens), 3, heads, dim, device=CUDA)).bfloat16().unbind(1)
    bias = torch.randn(heads, 2 * max(lens) + 7, device=CUDA).bfloat16() if with_bias else None
    spans = Spans.of([sum(lens[:i]) for i in range(len(lens))], lens, lens, CUDA)
    out, want = torch.full((2, *q.shape), float("nan"), device=CUDA)
    own = out.bfloat16()
    packed_attention(q, k, v, *spans, scale, bias, own)
    TorchKernels().attend(q.float(), k.float(), v.float(), spans, scale, None if bias is None else bias.float(), want)
    assert all(error(a, b) < 6e-3 for a, b in zip(own.split(lens), want.split(lens), strict=True))


@pytest.mark.parametrize(("causal", "with_bias"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("queries", "keys"), [([1], [1]), ([2, 64, 65, 1, 7], [2, 64, 130, 200, 300]), ([400, 70], [400, 1000])]
)
def test_paged_attention(queries: list[int], keys: list[int], *, causal: bool, with_bias: bool) -> None:
    """Beside rows that are others', in the last blocks of a pool of more than 2^32 elements, NaN behind the tokens."""
    from workers.kernels.head_pages import write_heads
    from workers.kernels.packed_attention import paged_attention

    torch.manual_seed(0)
    heads, dim, layers, layer, scale = 5, 64, 40, 37, 1.0 if with_bias else 0.125
    num_blocks = 2**32 // (layers * 2 * heads * BLOCK * dim) + 64
    pages = torch.empty(num_blocks, layers, 2, heads, BLOCK, dim, dtype=torch.bfloat16, device=CUDA)
    pages[-40:] = float("nan")
    assert pages.numel() > 2**32
    table = torch.zeros(len(keys), 17, dtype=torch.int64, device=CUDA)
    last = num_blocks - 1
    for row, count in enumerate(keys):
        held = -(-count // BLOCK)
        table[row, :held] = torch.arange(last, last - held, -1, device=CUDA)
        last -= held
        k, v = (0.5 * torch.randn(count, 3, heads, dim, device=CUDA)).bfloat16().unbind(1)[1:]
        mapping = slots(table[row], count)
        write_heads(k, v, pages, mapping, layer)
        at, offsets = mapping // BLOCK, mapping % BLOCK
        assert torch.equal(pages[at, layer, 0, :, offsets], k) and torch.equal(pages[at, layer, 1, :, offsets], v)
    assert pages[-40:, [layer - 1, layer + 1]].isnan().all()
    starts = [3 + sum(queries[:i]) for i in range(len(queries))]
    spans = Spans.of(starts, queries, keys, CUDA)
    q = torch.randn(3 + sum(queries), heads, dim, device=CUDA).bfloat16()
    bias = torch.randn(heads, 1100, device=CUDA).bfloat16() if with_bias else None
    out, want = torch.full((2, *q.shape), 7.0, device=CUDA)
    own = out.bfloat16()
    paged_attention(q, pages, table, layer, *spans, scale, bias, own, causal=causal)
    clean = Blocks(pages[-40:, layer : layer + 1].float().nan_to_num(), (table - num_blocks + 40).clamp_(min=0))
    wide = None if bias is None else bias.float()
    TorchKernels().attend_blocks(q.float(), clean, 0, spans, scale, wide, want, causal=causal)
    assert (own[:3] == 7).all()
    for start, count in zip(starts, queries, strict=True):
        assert error(own[start : start + count], want[start : start + count]) < 6e-3


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (37, 1000), (5, 4096)])
def test_layer_norm_of_a_sum(rows: int, size: int) -> None:
    from workers.layers.norm import LayerNorm

    torch.manual_seed(0)
    plain, fused = (LayerNorm(size, 1e-5, dtype=torch.bfloat16).to(CUDA) for _ in range(2))
    for norm in (plain, fused):
        norm.weight.data = torch.arange(size, device=CUDA).bfloat16() / size
        norm.bias.data = torch.linspace(-1, 1, size, device=CUDA).bfloat16()
    fused.fuse()
    x, delta = torch.randn(2, rows, size, device=CUDA).bfloat16() + 3
    (total, out), (wanted_total, want) = fused.of_sum(x, delta), plain.of_sum(x, delta)
    assert torch.equal(total, wanted_total) and error(out, want) < 3e-3
