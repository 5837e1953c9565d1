"""The reference against attention written out: one query, one head and one key at a time, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.bucketing import MAX_BUCKETS, MIN_BUCKET_SEQUENCES
from workers.attention.interface import AttentionBatch, AttentionProblem, GroupMetadata
from workers.attention.kv_views import kv_cache
from workers.attention.reference import ReferenceAttention

NUM_LAYERS = 2
HEAD_DIM = 8


def written_out(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [H, D], keys and values [C, K, D] -> [H * D]."""
    group = q.shape[0] // keys.shape[1]
    rows = []
    for head, query in enumerate(q.double()):
        weights = torch.softmax(keys[:, head // group].double() @ query * scale, 0)
        rows.append(weights @ values[:, head // group].double())
    return torch.cat(rows).float()


class World:
    """A pool full of NaN, and sequences whose keys and values are also kept dense."""

    def __init__(self, *, kv_heads: int, group_size: int, block_size: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.block_size = kv_heads * group_size, kv_heads, block_size
        region = RegionSpec(
            name="kv",
            num_layers=NUM_LAYERS,
            page_format=PageFormat.KV_HEADS_FIRST,
            dtype="float32",
            block_size=block_size,
            kv_heads=kv_heads,
            head_dim=HEAD_DIM,
        )
        self.num_blocks = 200
        storage = torch.zeros(self.num_blocks + 1, NUM_LAYERS, region.page_bytes(), dtype=torch.uint8)
        self.cache = kv_cache(GroupSpec("self", block_size, (region,)), [storage])
        self.cache.pages("kv").fill_(math.nan)
        self.scale = HEAD_DIM**-0.5
        self.backend = ReferenceAttention(
            AttentionProblem(
                kind="gqa",
                num_heads=self.heads,
                num_kv_heads=kv_heads,
                head_dim=HEAD_DIM,
                block_size=block_size,
                dtype=torch.float32,
                scale=self.scale,
            )
        )
        self.free = (torch.randperm(self.num_blocks, generator=self.random) + 1).tolist()
        self.blocks: dict[int, list[int]] = {}
        self.dense: dict[int, list[list[Tensor]]] = {}  # [sequence][layer] = [keys, values] [C, K, D]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def step(self, work: list[tuple[int, int]]) -> None:
        """(sequence, new tokens) pairs; decodes first. Compares every layer with attention written out."""
        starts, contexts, slots = [0], [], []
        for sequence, new in work:
            blocks = self.blocks.setdefault(sequence, [])
            empty = torch.zeros(0, self.kv_heads, HEAD_DIM)
            dense = self.dense.setdefault(sequence, [[empty, empty] for _ in range(NUM_LAYERS)])
            old = len(dense[0][0])
            while len(blocks) * self.block_size < old + new:
                blocks.append(self.free.pop())
            slots += [
                blocks[at // self.block_size] * self.block_size + at % self.block_size for at in range(old, old + new)
            ]
            contexts.append(old + new)
            starts.append(starts[-1] + new)
        table = torch.zeros(len(work), max((len(self.blocks[s]) for s, _ in work), default=0), dtype=torch.int64)
        for row, (sequence, _) in enumerate(work):
            table[row, : len(self.blocks[sequence])] = torch.tensor(self.blocks[sequence])
        batch = AttentionBatch(
            num_sequences=len(work),
            num_decodes=sum(new == 1 for _, new in work),
            query_lens=[new for _, new in work],
            query_starts=starts,
            context_lens=contexts,
            positions=torch.zeros(starts[-1], dtype=torch.int64),
            groups=(GroupMetadata(table, torch.tensor(slots, dtype=torch.int64)),),
            logits_rows=torch.zeros(0, dtype=torch.int64),
        )
        step = self.backend.begin(batch, 0, self.cache, "kv")
        for layer in range(NUM_LAYERS):
            q = self.draw(starts[-1], self.heads, HEAD_DIM)
            k, v = self.draw(starts[-1], self.kv_heads, HEAD_DIM), self.draw(starts[-1], self.kv_heads, HEAD_DIM)
            out = step.attend(layer, q, k, v)
            for (sequence, new), start, context in zip(work, starts, contexts, strict=False):
                dense = self.dense[sequence][layer]
                for half, part in enumerate((k, v)):
                    dense[half] = torch.cat((dense[half], part[start : start + new]))
                for i in range(new):
                    seen = context - new + i + 1
                    wanted = written_out(q[start + i], dense[0][:seen], dense[1][:seen], self.scale)
                    torch.testing.assert_close(out[start + i], wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(data=st.data())
def test_any_batch_over_any_history(data: st.DataObject) -> None:
    world = World(
        kv_heads=data.draw(st.integers(1, 3), "K"),
        group_size=data.draw(st.integers(1, 3), "G"),
        block_size=data.draw(st.integers(1, 6), "S"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    num_sequences = data.draw(st.integers(1, 6), "sequences")
    for _ in range(data.draw(st.integers(1, 4), "steps")):
        news = data.draw(st.lists(st.integers(0, 7), min_size=num_sequences, max_size=num_sequences), "new")
        work = [(sequence, new) for sequence, new in enumerate(news) if new]
        world.step(sorted(work, key=lambda pair: pair[1] != 1))


def test_many_decodes_of_very_different_lengths_in_buckets() -> None:
    world = World(kv_heads=2, group_size=2, block_size=4, seed=1)
    count = MAX_BUCKETS * MIN_BUCKET_SEQUENCES + 3
    lengths = torch.randint(2, 30, (count,), generator=world.random).tolist()
    world.step(list(enumerate(lengths)))
    world.step([(sequence, 1) for sequence in range(count)])
    world.step([(count, 1), *((sequence, 1) for sequence in range(count)), (count + 1, 9)])


def test_a_step_writes_its_own_slots_and_nothing_else() -> None:
    world = World(kv_heads=2, group_size=1, block_size=4, seed=2)
    world.step([(0, 8), (1, 5)])
    before = world.cache.pages("kv").clone()
    world.step([(1, 1)])
    changed = (world.cache.pages("kv") != before) & ~(world.cache.pages("kv").isnan() & before.isnan())
    touched = changed.nonzero()
    assert {int(row[0]) for row in touched} == {world.blocks[1][1]}
    assert {int(row[4]) for row in touched} == {1}  # block offset of the sixth token
    assert world.cache.pages("kv")[0].isnan().all(), "the null block belongs to padding"


def test_copied_blocks_are_read_before_any_is_written() -> None:
    world = World(kv_heads=1, group_size=1, block_size=2, seed=3)
    world.cache.pages("kv").copy_(world.draw(*world.cache.pages("kv").shape))
    before = world.cache.pages("kv").clone()
    world.cache.copy_blocks([1, 2, 7], [2, 3, 8])
    after = world.cache.pages("kv")
    assert torch.equal(after[[2, 3, 8]], before[[1, 2, 7]])
    assert torch.equal(after[[0, 1, 4, 5, 6, 7]], before[[0, 1, 4, 5, 6, 7]])


def test_layer_views_share_the_storage() -> None:
    world = World(kv_heads=2, group_size=1, block_size=4, seed=4)
    world.cache.layer("kv", 1)[5, 0, 1, 2] = 3.0
    assert (world.cache.pages("kv")[5, 1, 0, 1, 2] == 3.0).all()


@pytest.mark.parametrize("shape", [(5, NUM_LAYERS, 7), (5, 1, 256)])
def test_storage_of_another_region_is_refused(shape: tuple[int, ...]) -> None:
    region = RegionSpec(
        name="kv",
        num_layers=NUM_LAYERS,
        page_format=PageFormat.KV_HEADS_FIRST,
        dtype="float32",
        block_size=4,
        kv_heads=1,
        head_dim=8,
    )
    with pytest.raises(ValueError, match=r"region kv: storage is .*, not uint8 \[num_blocks, 2, 256\]"):
        kv_cache(GroupSpec("self", 4, (region,)), [torch.zeros(shape, dtype=torch.uint8)])


def test_rows_have_a_view_too() -> None:
    region = RegionSpec(
        name="latents", num_layers=2, page_format=PageFormat.ROWS, dtype="bfloat16", block_size=4, row_size=6
    )
    storage = torch.zeros(3, 2, region.page_bytes(), dtype=torch.uint8)
    cache = kv_cache(GroupSpec("self", 4, (region,)), [storage])
    assert cache.pages("latents").shape == (3, 2, 4, 6)
    assert cache.layer("latents", 1).dtype == torch.bfloat16
