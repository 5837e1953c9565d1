"""What a sparse indexer computes with on the GPU: scores by DeepGEMM, choices by FlashInfer, torch for what is missing.

Nothing here waits for the device. Shapes: P rows that ask, B sequences with one row each, C context, I index heads,
J index head size, S block size (64), M blocks of the longest, K rows chosen.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from workers.attention.environment import Environment
from workers.attention.index_keys import gather_pages
from workers.attention.indexer import index_scores, select

PAGE = 64  # tokens, of DeepGEMM's pages
MAX_CHOSEN = 2048  # by FlashInfer, under CUDA graphs
DEEP_GEMM = "deep_gemm"
TOPK = "flashinfer_topk"  # a module of FlashInfer's that takes half an hour to build, and is used when it is there
_BUILD = "is not built, which flashinfer.jit.topk.gen_topk_module().build_and_load() does in half an hour"


class QuantizedQueries(NamedTuple):
    """score = sum over heads of weight * relu(query · key), the key in fp8 times its scale."""

    values: Tensor  # e4m3 [P, I, J]
    weights: Tensor  # fp32 [P, I], every scale of the queries included

    def rows(self, start: int, end: int) -> QuantizedQueries:
        return QuantizedQueries(self.values[start:end], self.weights[start:end])


class Scores(Protocol):
    def schedule(self, lengths: Tensor) -> Tensor | None:
        """Of a step's single tokens, for all layers. lengths int32 [B]."""
        ...

    def paged(
        self,
        queries: QuantizedQueries,
        pages: Tensor,
        layer: int,
        table: Tensor,
        lengths: Tensor,
        schedule: Tensor | None,
    ) -> Tensor:
        """pages uint8 [blocks, layers, S * (J + 4)], table int32 [B, M], lengths int32 [B] -> fp32 [B, M * S].

        Behind a length anything may stand.
        """
        ...

    def packed(self, queries: QuantizedQueries, keys: Tensor, scales: Tensor, lengths: Tensor) -> Tensor:
        """keys e4m3 [C, J], scales fp32 [C], lengths int32 [P]: visible keys, the first ones -> fp32 [P, C or more].

        Behind a length anything may stand.
        """
        ...


class DeepGemmScores:
    """DeepGEMM's kernels; the paged one reads pages where they lie."""

    def __init__(self) -> None:
        import deep_gemm

        self._library: Any = deep_gemm

    def schedule(self, lengths: Tensor) -> Tensor | None:
        return self._library.get_paged_mqa_logits_metadata(lengths.unsqueeze(1), PAGE, self._library.get_num_sms())

    def paged(
        self,
        queries: QuantizedQueries,
        pages: Tensor,
        layer: int,
        table: Tensor,
        lengths: Tensor,
        schedule: Tensor | None,
    ) -> Tensor:
        rows = pages[:, layer].view(len(pages), PAGE, 1, -1)  # a row is nominal: values of all come first
        values, lens = queries.values.unsqueeze(1), lengths.unsqueeze(1)
        return self._library.fp8_paged_mqa_logits(
            values, rows, queries.weights, lens, table, schedule, table.shape[1] * PAGE, clean_logits=False
        )

    def packed(self, queries: QuantizedQueries, keys: Tensor, scales: Tensor, lengths: Tensor) -> Tensor:
        starts = torch.zeros_like(lengths)
        return self._library.fp8_mqa_logits(
            queries.values, (keys, scales), queries.weights, starts, lengths, clean_logits=False
        )


class TorchScores:
    def schedule(self, lengths: Tensor) -> Tensor | None:
        return None

    def paged(
        self,
        queries: QuantizedQueries,
        pages: Tensor,
        layer: int,
        table: Tensor,
        lengths: Tensor,
        schedule: Tensor | None,
    ) -> Tensor:
        size = queries.values.shape[2]
        # Columns behind the longest sequence hold whatever block comes with them.
        rows = table.to(torch.int64) * pages.shape[1] + layer
        keys, scales = gather_pages(pages, rows.flatten(), size)
        wide = (keys.float() * scales.unsqueeze(1)).view(len(table), -1, size)
        return index_scores(queries.values.float().unsqueeze(1), queries.weights.unsqueeze(1), wide).squeeze(1)

    def packed(self, queries: QuantizedQueries, keys: Tensor, scales: Tensor, lengths: Tensor) -> Tensor:
        wide = keys.float() * scales.unsqueeze(1)
        return index_scores(queries.values.float()[None], queries.weights[None], wide[None]).squeeze(0)


Choose = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""scores fp32 [P, C or more] (may be overwritten), lengths int32 [P], table int32 [P or 1, M] of pages, K -> int32
[P, K]: page * S + offset of the K best of the first `lengths`, of equal ones the first; -1 behind those of a row that
sees fewer."""


def choose_flashinfer(scores: Tensor, lengths: Tensor, table: Tensor, topk: int) -> Tensor:
    import flashinfer

    owner = None if len(table) == len(scores) else torch.zeros_like(lengths)
    return flashinfer.top_k_page_table_transform(
        scores,
        table,
        lengths,
        topk,
        row_to_batch=owner,
        deterministic=True,
        tie_break=1,
        dsa_graph_safe=True,
        page_size=PAGE,
    )


def choose_torch(scores: Tensor, lengths: Tensor, table: Tensor, topk: int) -> Tensor:
    best = select(scores, lengths.to(torch.int64), topk)
    pages = table.expand(len(scores), -1).gather(1, best.clamp(min=0) // PAGE).to(torch.int64)
    slots = torch.where(best < 0, best, pages * PAGE + best % PAGE).to(torch.int32)
    return torch.nn.functional.pad(slots, (0, topk - slots.shape[1]), value=-1)


@dataclass(frozen=True, slots=True)
class IndexTools:
    scores: Scores
    choose: Choose

    @classmethod
    def without(cls, rejected: Collection[str]) -> IndexTools:
        """The fastest of each but for the named ones."""
        return cls(
            TorchScores() if DEEP_GEMM in rejected else DeepGemmScores(),
            choose_torch if TOPK in rejected else choose_flashinfer,
        )


def lacking_tools(environment: Environment, num_heads: int, topk: int) -> tuple[tuple[str, str], ...]:
    """The fast tools that an indexer does without here, each with the reason."""
    if num_heads not in (32, 64):
        no_scores = f"scores 32 or 64 index heads, not {num_heads}"
    else:
        no_scores = environment.lacks(DEEP_GEMM)
    if topk > MAX_CHOSEN:
        no_choice = f"chooses at most {MAX_CHOSEN} rows, not {topk}"
    elif TOPK not in environment.disabled and TOPK not in dict(environment.libraries):
        no_choice = environment.lacks("flashinfer") or _BUILD
    else:
        no_choice = environment.lacks("flashinfer") or environment.lacks(TOPK)
    found = ((DEEP_GEMM, no_scores), (TOPK, no_choice))
    return tuple((name, reason) for name, reason in found if reason is not None)
