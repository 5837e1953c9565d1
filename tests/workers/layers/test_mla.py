"""The ways into latent attention, one test each, against plain attention over the whole text without any cache.

Weights are used as loaded (kv_b_proj in one matrix); shapes with a query latent and without.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.attention.interface import AttentionBatch, GroupMetadata, KvCache
from workers.attention.mla_interface import INDEX_KEYS, LATENTS, MlaProblem
from workers.attention.mla_reference import ReferenceMla
from workers.layers.mla import IndexerShape, LatentAttention, MlaShape
from workers.layers.rotary import RotaryEmbedding

LITE = MlaShape(
    hidden_size=24,
    num_heads=3,
    nope_dim=10,
    rope_dim=8,
    value_dim=6,
    latent_size=16,
    query_latent_size=None,
    bias=False,
    scale=0.2,
    indexer=None,
)
SHAPES = {
    "lite": LITE,
    "query-latent": replace(LITE, query_latent_size=12, bias=True),
    "indexer": replace(LITE, query_latent_size=12, indexer=IndexerShape(num_heads=4, head_dim=12, topk=1000)),
}
BLOCK, PIECE, LAYER = 4, 5, 1
ROTARY = RotaryEmbedding(LITE.rope_dim, 100.0)


class World:
    """One layer, its cache full of NaN, and three texts of hidden states."""

    def __init__(self, shape: MlaShape, *, piece: int = 1000) -> None:
        self.shape = shape
        self.layer = LatentAttention(LAYER, shape, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        self.texts = [torch.randn(length, shape.hidden_size, generator=generator) for length in (23, 2, 14)]
        self.tables = torch.randperm(29, generator=generator)[:18].view(3, 6) + 1
        pages = {LATENTS: torch.full((30, 3, BLOCK, shape.latent_size + shape.rope_dim), torch.nan)}
        if shape.indexer is not None:
            pages[INDEX_KEYS] = torch.full((30, 3, BLOCK, shape.indexer.head_dim), torch.nan)
        self.cache = KvCache(pages)
        self.backend = ReferenceMla(
            MlaProblem(
                num_heads=shape.num_heads,
                latent_size=shape.latent_size,
                rope_size=shape.rope_dim,
                block_size=BLOCK,
                dtype=torch.float32,
                scale=shape.scale,
                index_topk=None if shape.indexer is None else shape.indexer.topk,
                max_piece_tokens=piece,
            )
        )

    def run(self, runs: list[tuple[int, int, int]]) -> list[Tensor]:
        """Each (text, start, end), single tokens first -> what the layer makes of them."""
        lens = [end - start for _, start, end in runs]
        positions = torch.cat([torch.arange(start, end) for _, start, end in runs])
        table = torch.stack([self.tables[text] for text, _, _ in runs])
        sequence_of = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(lens))
        slots = table[sequence_of, positions // BLOCK] * BLOCK + positions % BLOCK
        batch = AttentionBatch(
            num_sequences=len(runs),
            num_decodes=lens.count(1),
            query_lens=lens,
            query_starts=[0, *torch.tensor(lens).cumsum(0).tolist()],
            context_lens=[end for _, _, end in runs],
            positions=positions,
            groups=(GroupMetadata(table, slots),),
            logits_rows=torch.empty(0, dtype=torch.int64),
        )
        step = self.backend.begin(batch, 0, self.cache)
        self.kinds = [str(context.kind) for context in step.contexts]
        x = torch.cat([self.texts[text][start:end] for text, start, end in runs])
        return list(self.layer(x, ROTARY.rotation(positions, torch.float32), step).split(lens))

    def expected(self, text: int, start: int, end: int) -> Tensor:
        """Rows [start, end) of attention over the whole text, every head's keys and values written out."""
        shape, layer, x = self.shape, self.layer, self.texts[text][:end]
        rotation = ROTARY.rotation(torch.arange(end), torch.float32)
        if shape.query_latent_size is None:
            q = layer.q_proj(x)
        else:
            q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
        q = q.view(end, shape.num_heads, -1)
        q = torch.cat((q[..., : shape.nope_dim], rotation.apply_interleaved(q[..., shape.nope_dim :])), -1)
        compressed = layer.kv_a_proj_with_mqa(x)
        rope = rotation.apply_interleaved(compressed[:, None, shape.latent_size :])
        both = layer.kv_b_proj(layer.kv_a_layernorm(compressed[:, : shape.latent_size]))
        both = both.view(end, shape.num_heads, -1)
        k = torch.cat((both[..., : shape.nope_dim], rope.expand(-1, shape.num_heads, -1)), -1)
        scores = torch.einsum("nhd,chd->hnc", q, k) * shape.scale
        scores = scores.masked_fill(torch.ones(end, end, dtype=torch.bool).triu(1), float("-inf"))
        out = torch.einsum("hnc,chv->nhv", scores.softmax(-1), both[..., shape.nope_dim :])
        return layer.o_proj(out.flatten(1))[start:]

    def check(self, runs: list[tuple[int, int, int]]) -> None:
        for got, run in zip(self.run(runs), runs, strict=True):
            torch.testing.assert_close(got, self.expected(*run), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> MlaShape:
    return SHAPES[request.param]


def test_fresh(shape: MlaShape) -> None:
    world = World(shape)
    world.check([(0, 0, 23), (1, 0, 2), (2, 0, 14)])
    assert world.kinds == ["fresh"] * 3


def test_cached(shape: MlaShape) -> None:
    world = World(shape)
    world.run([(0, 0, 9), (2, 0, 4)])
    world.check([(0, 9, 23), (1, 0, 2), (2, 4, 14)])
    assert world.kinds == ["cached", "fresh", "cached"]


def test_chunked(shape: MlaShape) -> None:
    """Long contexts in pieces, beside a short one that has no piece at all."""
    world = World(shape, piece=PIECE)
    world.check([(0, 0, 12), (2, 0, 3)])
    world.check([(0, 12, 19), (1, 0, 2), (2, 3, 5)])
    assert world.kinds == ["chunked", "fresh", "cached"]
    world.check([(0, 19, 23), (2, 5, 14)])
    assert world.kinds == ["chunked", "chunked"]


def test_generation(shape: MlaShape) -> None:
    """Absorbed: one token of each text, alone, together, and beside a chunk."""
    world = World(shape)
    world.run([(0, 0, 20), (2, 0, 7)])
    world.check([(1, 0, 1), (2, 7, 8)])
    world.check([(0, 20, 21)])
    world.check([(1, 1, 2), (0, 21, 22), (2, 8, 14)])
    assert world.kinds == ["cached"]


def test_cached_and_new_tokens_together_decide_whether_to_choose() -> None:
    indexer = IndexerShape(num_heads=4, head_dim=12, topk=10)
    world = World(replace(SHAPES["indexer"], indexer=indexer))
    world.check([(0, 0, 6), (2, 0, 10)])  # 10 visible tokens all fit
    assert world.kinds == ["fresh", "fresh"]
    world.run([(0, 6, 12), (2, 10, 14)])  # 6 and 4 new tokens, 12 and 14 visible ones
    assert world.kinds == []
    keys = world.cache.layer(INDEX_KEYS, LAYER)
    held = keys[world.tables[0]].flatten(0, 1)[:12]
    rotation = ROTARY.rotation(torch.arange(12), torch.float32)
    assert world.layer.indexer is not None
    torch.testing.assert_close(held, world.layer.indexer.keys(world.texts[0][:12], rotation))


def test_a_sparse_token_that_may_choose_nearly_all_sees_nearly_all() -> None:
    """With topk one below the context, the result is that of attention without the lowest-scoring token."""
    indexer = IndexerShape(num_heads=4, head_dim=12, topk=13)
    world = World(replace(SHAPES["indexer"], indexer=indexer))
    world.run([(2, 0, 13)])
    (got,) = world.run([(2, 13, 14)])
    layer, x = world.layer, world.texts[2]
    rotation = ROTARY.rotation(torch.arange(14), torch.float32)
    assert layer.indexer is not None
    asked = layer.indexer.ask(x, layer.q_a_layernorm(layer.q_a_proj(x)), rotation)
    dots = torch.einsum("ij,cj->ic", asked.queries[13], layer.indexer.keys(x, rotation)).relu()
    left_out = int((asked.weights[13] @ dots).argmin())
    kept = [position for position in range(14) if position != left_out]
    rows = world.cache.layer(LATENTS, LAYER)[world.tables[2]].flatten(0, 1)[kept]
    keys, values = layer._expand(rows)
    _, q = layer._queries(x, rotation)
    weights = (torch.einsum("hd,chd->hc", q[13], keys) * LITE.scale).softmax(-1)
    wanted = layer.o_proj(torch.einsum("hc,chv->hv", weights, values).flatten())
    torch.testing.assert_close(got[0], wanted, rtol=1e-4, atol=1e-5)
