"""Decoding with a sparse indexer on one GPU, one layer of DeepSeek-V3.2's widths: each part beside its bound.

    python -m benchmarks.dsa [--context 2048 4096 65536] [--batch 64] [--layers 8] [--repeats 20] [--json FILE]

128 heads, query latents of 1536, 64 index heads of 128, 2048 rows chosen; no experts, no output projection. Inputs are
random, of --layers layers that take turns, each with a cache of its own: nothing that a layer reads was read by the
one before. A part is a CUDA graph of all layers; medians of --repeats replays, divided by the layers.

projections: what the indexer adds to the products of x and of the query latents. The bound counts bytes at the rate of
a device copy, or FLOPs at that of a large bf16 product (twice that for fp8), whichever takes longer; both rates are
measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine_gpu import Ceilings, device_seconds
from benchmarks.report import Figure, Report, Setting, progress, publish
from workers.attention.environment import Environment
from workers.attention.hopper_dsa import HopperDsa
from workers.attention.index_keys import quantize_rows
from workers.attention.index_tools import IndexTools, QuantizedQueries, lacking_tools
from workers.attention.interface import AttentionBatch, GroupMetadata, KvCache
from workers.attention.mla_interface import INDEX_KEYS, LATENTS, MlaProblem
from workers.kernels.index_rows import quantize_queries, write_index_keys
from workers.kernels.rotary import RotationTable
from workers.kernels.tactic_table import RULES

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
PAGE = 64
HIDDEN, QUERY_LATENT, HEADS, LATENT, ROPE = 7168, 1536, 128, 512, 64
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 2048
TARGETS = {4096: 150.0, 65536: 340.0}  # µs, all but the projections


@dataclass(frozen=True, slots=True)
class Work:
    """What a part must do at least, for one layer."""

    bytes: float
    flops: float = 0.0  # of bf16

    def bound_us(self, ceilings: Ceilings) -> float:
        return 1e6 * max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flops)


@dataclass(frozen=True, slots=True)
class Layer:
    """Inputs of one layer."""

    x: Tensor  # [B, d]
    latents: Tensor  # [B, Q]
    of_x: Tensor  # weights of index keys and index weights
    of_latents: Tensor  # of index queries
    keys: Tensor  # [B, J]
    queries: Tensor  # [B, I, J]
    weights: Tensor  # [B, I]
    q: Tensor  # [B, H, L]
    q_rope: Tensor  # [B, H, R]

    @classmethod
    def draw(cls, batch: int) -> Layer:
        return cls(
            random(batch, HIDDEN),
            random(batch, QUERY_LATENT),
            random(INDEX_DIM + INDEX_HEADS, HIDDEN),
            random(INDEX_HEADS * INDEX_DIM, QUERY_LATENT),
            random(batch, INDEX_DIM),
            random(batch, INDEX_HEADS, INDEX_DIM),
            random(batch, INDEX_HEADS),
            random(batch, HEADS, LATENT),
            random(batch, HEADS, ROPE),
        )


Part = tuple[Callable[[int], object], Work]  # of one layer


class Decode:
    """A step of single tokens at one context length, and its parts."""

    def __init__(self, batch: int, context: int, num_layers: int, tools: IndexTools) -> None:
        self.batch, self.context = batch, context
        blocks = -(-context // PAGE)
        pages = torch.empty(1 + batch * blocks, num_layers, PAGE, LATENT + ROPE, dtype=BF16, device=CUDA)
        index_pages = torch.empty(len(pages), num_layers, PAGE * (INDEX_DIM + 4), dtype=torch.uint8, device=CUDA)
        for some, keys in zip(pages.split(256), index_pages.split(256), strict=True):
            some.normal_()
            values, scales = quantize_rows(torch.randn(len(some) * num_layers, PAGE, INDEX_DIM, device=CUDA))
            parts = values.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)
            keys.copy_(torch.cat(parts, 1).view(keys.shape))
        table = (torch.randperm(batch * blocks, device=CUDA) + 1).view(batch, blocks)
        positions = torch.full((batch,), context - 1, device=CUDA)
        slots = table[:, -1] * PAGE + (context - 1) % PAGE
        self._batch = AttentionBatch(
            num_sequences=batch,
            num_decodes=batch,
            query_lens=[1] * batch,
            query_starts=list(range(batch + 1)),
            context_lens=[context] * batch,
            positions=positions,
            groups=(GroupMetadata(table, slots),),
            logits_rows=torch.arange(batch, device=CUDA),
        )
        problem = MlaProblem(
            num_heads=HEADS,
            latent_size=LATENT,
            rope_size=ROPE,
            block_size=PAGE,
            dtype=BF16,
            scale=(128 + ROPE) ** -0.5,
            index_topk=TOPK,
            index_heads=INDEX_HEADS,
            index_head_dim=INDEX_DIM,
            nope_size=128,
            value_size=128,
        )
        self._cache = KvCache({LATENTS: pages, INDEX_KEYS: index_pages})
        self._backend = HopperDsa(problem, tools)
        self.step = self._backend.begin(self._batch, 0, self._cache)
        self.layers = [Layer.draw(batch) for _ in range(num_layers)]
        angles = torch.outer(torch.arange(context, device=CUDA), 1e4 ** -(torch.arange(0, ROPE, 2, device=CUDA) / ROPE))
        self._rotation = RotationTable(angles.cos(), angles.sin())
        self._weight, self._bias = random(INDEX_DIM), random(INDEX_DIM)

    def project(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return F.linear(layer.x, layer.of_x), F.linear(layer.latents, layer.of_latents)

    def write(self, index: int) -> None:
        step, layer = self.step, self.layers[index]
        write_index_keys(
            layer.keys,
            self._rotation,
            step.positions,
            self._weight,
            self._bias,
            1e-6,
            step.index_pages,
            PAGE,
            step.slots,
            index,
        )

    def attend_all(self, index: int) -> Tensor:
        layer = self.layers[index]
        return self.step.dense.decode(index, layer.q, layer.q_rope, RULES)

    def parts(self) -> dict[str, Part]:
        """Contexts of up to index_topk are attended whole."""
        rows, width = self.batch * self.context, LATENT + ROPE
        queries = 2 * self.batch * HEADS * (width + LATENT)
        work = Work(2 * rows * width + queries, 2 * rows * HEADS * (width + LATENT))
        return {
            "index keys": (self.write, Work(self.batch * (3 * INDEX_DIM + 4))),
            "attention to all": (self.attend_all, work),
        }


class SparseDecode(Decode):
    """Of contexts that are longer than what is chosen."""

    def __init__(self, batch: int, context: int, num_layers: int, tools: IndexTools) -> None:
        super().__init__(batch, context, num_layers, tools)
        self.asked = [self.ask(layer) for layer in self.layers]
        sparse = self.step.sparse
        assert sparse is not None and sparse.singles is not None, "contexts are longer than what is chosen"
        self._singles, self._tools = sparse.singles, tools
        self.scores = [self.score(index) for index in range(num_layers)]
        self.chosen = [self.choose(index, self.scores[index]) for index in range(num_layers)]

    def ask(self, layer: Layer) -> QuantizedQueries:
        asked = quantize_queries(layer.queries, layer.weights, self._rotation, self._batch.positions, 0.01)
        return QuantizedQueries(*asked)

    def score(self, index: int) -> Tensor:
        singles = self._singles
        return self._tools.scores.paged(
            self.asked[index], self.step.index_pages, index, singles.blocks, singles.lengths, singles.schedule
        )

    def choose(self, index: int, scores: Tensor) -> Tensor:
        return self._tools.choose(scores, self._singles.lengths, self._singles.pages, TOPK)

    def attend(self, index: int, chosen: Tensor) -> Tensor:
        layer = self.layers[index]
        return self.step.attend(index, layer.q, layer.q_rope, chosen)

    def whole(self, index: int) -> Tensor:
        """All but the projections, each part on what the one before made."""
        self.write(index)
        self.asked[index] = self.ask(self.layers[index])
        return self.attend(index, self.step.choose(index, self.asked[index]))

    def parts(self) -> dict[str, Part]:
        batch, context = self.batch, self.context
        scores = batch * context * 4
        asked = batch * INDEX_HEADS * INDEX_DIM
        rows = batch * min(TOPK, context)
        width = LATENT + ROPE
        choosing = Work(batch * context * (INDEX_DIM + 4) + asked + scores, batch * context * INDEX_HEADS * INDEX_DIM)
        attending = Work(
            rows * (2 * width + 4) + 2 * batch * HEADS * (width + LATENT), 2 * rows * HEADS * (width + LATENT)
        )
        weights = INDEX_HEADS * INDEX_DIM * QUERY_LATENT + (INDEX_DIM + INDEX_HEADS) * HIDDEN
        return {
            "projections": (lambda i: self.project(self.layers[i]), Work(2 * weights, 2 * batch * weights)),
            "index keys": (self.write, Work(batch * (3 * INDEX_DIM + 4))),
            "index queries": (lambda i: self.ask(self.layers[i]), Work(3 * asked)),
            "scores": (self.score, choosing),
            "choice": (lambda i: self.choose(i, self.scores[i]), Work(scores + 4 * rows)),
            "attention": (lambda i: self.attend(i, self.chosen[i]), attending),
            "all but projections": (
                self.whole,
                Work(choosing.bytes - scores + attending.bytes + 3 * asked, choosing.flops + attending.flops),
            ),
        }


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(BF16)


def per_layer_us(part: Callable[[int], object], num_layers: int, repeats: int) -> float:
    for index in range(num_layers):
        part(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [part(index) for index in range(num_layers)]
    seconds = device_seconds(graph.replay, repeats)
    del kept
    return 1e6 * seconds / num_layers


@torch.inference_mode()
def measure(
    batch: int, context: int, num_layers: int, repeats: int, tools: IndexTools, ceilings: Ceilings
) -> list[Figure]:
    decode = (SparseDecode if context > TOPK else Decode)(batch, context, num_layers, tools)
    figures: list[Figure] = []
    for name, (part, work) in decode.parts().items():
        value = per_layer_us(part, num_layers, repeats)
        again = per_layer_us(part, num_layers, repeats)
        note = f"{work.bytes / 1e6:.1f} MB, {work.flops / 1e9:.1f} GFLOP; again {again:.1f}"
        if name.startswith("all") and context in TARGETS:
            note += f"; target {TARGETS[context]:g}, {TARGETS[context] / value:.2f} × it"
        progress(f"{context}: {name} {value:.1f} us")
        figures.append(
            Figure(f"{context}: {name}", value, "µs", work.bound_us(ceilings), less_is_better=True, note=note)
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 4096, 65536])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = Environment.probe(CUDA)
    lacking = lacking_tools(environment, INDEX_HEADS, TOPK)
    ceilings = Ceilings.measure()
    figures = [
        Figure("device copy", ceilings.bytes_per_s / 1e12, "TB/s", note="bytes read and written"),
        Figure("product", ceilings.flops / 1e12, "TFLOP/s", note="bf16, 8192 cubed"),
    ]
    for context in arguments.context:
        tools = IndexTools.without(dict(lacking))
        figures += measure(arguments.batch, context, arguments.layers, arguments.repeats, tools, ceilings)
        torch.cuda.empty_cache()
    told = {"context": arguments.context, "batch": arguments.batch, "layers": arguments.layers}
    what = f"a layer's decode with a sparse indexer on {torch.cuda.get_device_name()}"
    details = {"gpu": torch.cuda.get_device_name(), "without": dict(lacking)}
    publish(
        Report("dsa", what, told | {"repeats": arguments.repeats}, figures, Setting.here(), details), arguments.json
    )


if __name__ == "__main__":
    main()
