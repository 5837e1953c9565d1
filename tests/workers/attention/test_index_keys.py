"""fp8 pages of index keys, byte by byte, and what is scored and chosen on them in plain torch."""

import pytest
import torch
from torch import Tensor

from kvtransfer.layout import PageFormat
from workers.attention.index_keys import gather_pages, index_key_region, quantize_rows, write_pages
from workers.attention.index_tools import PAGE, QuantizedQueries, TorchScores, choose_torch
from workers.attention.indexer import index_scores, select
from workers.attention.interface import AttentionBatch, GroupMetadata, KvCache
from workers.attention.mla_interface import INDEX_KEYS, LATENTS, IndexQueries, MlaProblem
from workers.attention.mla_reference import ReferenceMla

SIZE = 128


@pytest.mark.parametrize(
    ("head_dim", "dtype", "page_format"),
    [
        (128, "bfloat16", PageFormat.FP8_VALUES_THEN_SCALES),
        (128, "float16", PageFormat.FP8_VALUES_THEN_SCALES),
        (128, "float32", PageFormat.ROWS),
        (64, "bfloat16", PageFormat.ROWS),
    ],
)
def test_what_is_kept_is_said_by_the_model_alone(head_dim: int, dtype: str, page_format: PageFormat) -> None:
    region = index_key_region("keys", 3, 64, head_dim, dtype)
    assert region.page_format is page_format
    fp8 = page_format is PageFormat.FP8_VALUES_THEN_SCALES
    row = head_dim + 4 if fp8 else head_dim * region.item_bytes
    assert region.page_bytes() == 64 * row


def test_rows_are_scaled_to_the_largest_number() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, SIZE, generator=generator) * torch.logspace(-3, 3, 7)[:, None, None]
    values, scales = quantize_rows(rows)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (7, 5)
    assert (values.float().abs().amax(-1) == 448).all()
    error = (values.float() * scales[..., None] - rows).norm(dim=-1) / rows.norm(dim=-1)
    assert 0.01 < error.max() < 0.04
    values, scales = quantize_rows(torch.zeros(2, SIZE))
    assert (values.float() == 0).all() and (scales > 0).all()


def test_pages_hold_values_then_scales() -> None:
    generator = torch.Generator().manual_seed(1)
    block, layers, layer = 4, 3, 1
    pages = torch.randint(0, 120, (6, layers, block * (SIZE + 4)), dtype=torch.uint8, generator=generator)
    before = pages.clone()
    keys = torch.randn(5, SIZE, generator=generator)
    slots = torch.tensor([4, 7, 23, 8, 21])
    write_pages(pages, layer, slots, keys)
    values, scales = quantize_rows(keys)
    for row, slot in enumerate(slots.tolist()):
        page = pages[slot // block, layer]
        start = slot % block
        assert torch.equal(page[start * SIZE : (start + 1) * SIZE], values[row].view(torch.uint8))
        assert torch.equal(page[block * SIZE + 4 * start :][:4].view(torch.float32), scales[row : row + 1])
    changed = pages != before
    assert not changed[:, [0, 2]].any() and not changed[[0, 3, 4]].any()
    got, got_scales = gather_pages(pages, torch.tensor([5, 1]) * layers + layer, SIZE)
    at = torch.tensor([slots.tolist().index(23), slots.tolist().index(4)])
    assert torch.equal(got.view(torch.uint8)[[3, 4]], values.view(torch.uint8)[at])
    assert torch.equal(got_scales[[3, 4]], scales[at])


class Asked:
    """Three sequences over pages in any order, and what they ask."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.lengths = torch.tensor([130, 1, 64], dtype=torch.int32)
        self.table = torch.tensor([[3, 1, 6], [5, 0, 0], [2, 0, 0]], dtype=torch.int32)
        self.pages = torch.zeros(7, 2, PAGE * (SIZE + 4), dtype=torch.uint8)
        write_pages(self.pages, 1, torch.arange(7 * PAGE), torch.randn(7 * PAGE, SIZE, generator=generator))
        self.raw = torch.randn(3, 4, SIZE, generator=generator)
        self.weights = torch.randn(3, 4, generator=generator)
        values, scales = quantize_rows(self.raw)
        self.queries = QuantizedQueries(values, self.weights * scales)

    def keys(self, row: int) -> Tensor:
        values, scales = gather_pages(self.pages, self.table[row].long() * 2 + 1, SIZE)
        return (values.float() * scales[:, None])[: int(self.lengths[row])]


def test_scores_of_pages_and_of_packed_keys() -> None:
    asked, torch_scores = Asked(), TorchScores()
    schedule = torch_scores.schedule(asked.lengths)
    paged = torch_scores.paged(asked.queries, asked.pages, 1, asked.table, asked.lengths, schedule)
    for row in range(3):
        keys = asked.keys(row)
        want = index_scores(asked.raw[row][None, None], asked.weights[row][None, None], keys[None]).flatten()
        assert (paged[row, : len(keys)] - want).norm() < 0.05 * want.norm()
        values, scales = quantize_rows(keys)
        packed = torch_scores.packed(asked.queries.rows(row, row + 1), values, scales, asked.lengths[row : row + 1])
        assert (packed.flatten() - want).norm() < 0.05 * want.norm() and packed.shape == (1, len(keys))


@pytest.mark.parametrize("topk", [5, 100, 300])
def test_choices_are_slots(topk: int) -> None:
    asked = Asked()
    scores = torch.randn(3, 3 * PAGE, generator=torch.Generator().manual_seed(3))
    chosen = choose_torch(scores.clone(), asked.lengths, asked.table * 2, topk)
    assert chosen.shape == (3, topk) and chosen.dtype == torch.int32
    best = select(scores.clone(), asked.lengths.long(), topk)
    for row, length in enumerate(asked.lengths.tolist()):
        count = min(length, topk)
        slots = [int(asked.table[row, place // PAGE]) * 2 * PAGE + place % PAGE for place in best[row, :count].tolist()]
        assert chosen[row].tolist() == slots + [-1] * (topk - count)
    one = choose_torch(scores.clone(), asked.lengths, asked.table[:1] * 2, topk)
    assert torch.equal(one[0], chosen[0])


def test_the_reference_reads_what_it_wrote_in_fp8() -> None:
    """As it does rows that hold the same numbers, for a prompt whose tokens choose, and a single token after it."""
    generator = torch.Generator().manual_seed(4)
    block, layers, layer, blocks = 8, 2, 1, 6
    problem = MlaProblem(
        num_heads=3, latent_size=16, rope_size=8, block_size=block, dtype=torch.float32, scale=0.2, index_topk=6
    )
    caches = [
        KvCache({LATENTS: torch.zeros(blocks, layers, block, 24), INDEX_KEYS: keys})
        for keys in (
            torch.zeros(blocks, layers, block * (SIZE + 4), dtype=torch.uint8),
            torch.zeros(blocks, layers, block, SIZE),
        )
    ]
    table = torch.tensor([[4, 2, 5]])
    for cached, new in ((0, 19), (19, 1)):
        positions = torch.arange(cached, cached + new)
        slots = table[0, positions // block] * block + positions % block
        batch = AttentionBatch(
            num_sequences=1,
            num_decodes=int(new == 1),
            query_lens=[new],
            query_starts=[0, new],
            context_lens=[cached + new],
            positions=positions,
            groups=(GroupMetadata(table, slots),),
            logits_rows=torch.empty(0, dtype=torch.int64),
        )
        keys, latents, queries = (torch.randn(new, size, generator=generator) for size in (SIZE, 24, 3 * 24))
        asked = IndexQueries(torch.randn(new, 4, SIZE, generator=generator), torch.randn(new, 4, generator=generator))
        values, scales = quantize_rows(keys)
        seen: list[Tensor] = []
        for cache, written in zip(caches, (keys, values.float() * scales[:, None]), strict=True):
            step = ReferenceMla(problem).begin(batch, 0, cache)
            step.write(layer, latents, written)
            seen.append(step.generate(layer, queries.view(new, 3, 24), asked))
        assert torch.equal(seen[0], seen[1]) and seen[0].shape == (new, 3, 16)
    assert not caches[0].pages(INDEX_KEYS)[:, 0].any()
