"""FlashInfer's FA3 over latent rows of each query's own choice: pages of one token, a query as a request of its own.

Planned once, for a number of queries that all see as many rows; later runs, under CUDA graphs too, launch one kernel.
Shapes: P queries, K rows of each, H heads, L latent size, R rotary size.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata
from torch import Tensor

from workers.attention.mla_interface import MlaProblem


class ChosenRows:
    """Its plan takes 8 MiB, on the device and on the host."""

    def __init__(self, problem: MlaProblem, num_queries: int, num_chosen: int, workspace: Tensor) -> None:
        ints: dict[str, Any] = {"dtype": torch.int32, "device": workspace.device}
        self._chosen = torch.zeros(num_queries, num_chosen, **ints)
        self._wrapper: Any = BatchMLAPagedAttentionWrapper(
            workspace,
            use_cuda_graph=True,
            qo_indptr=torch.zeros(num_queries + 1, **ints),
            kv_indptr=torch.zeros(num_queries + 1, **ints),
            kv_indices=self._chosen.view(-1),
            kv_len_arr=torch.zeros(num_queries, **ints),
            backend="fa3",
        )
        starts = torch.arange(num_queries + 1, dtype=torch.int32)
        lengths = torch.full((num_queries,), num_chosen, dtype=torch.int32)
        rows = torch.zeros(num_queries * num_chosen, dtype=torch.int32)
        self._wrapper.plan(
            metadata=MLAPlanMetadata.csr(starts, starts * num_chosen, rows, lengths),
            num_heads=problem.num_heads,
            head_dim_ckv=problem.latent_size,
            head_dim_kpe=problem.rope_size,
            page_size=1,
            causal=False,
            sm_scale=problem.scale,
            q_data_type=problem.dtype,
            kv_data_type=problem.dtype,
            query_layout="split",
            kv_cache_layout="split",
        )

    def attend(self, q: Tensor, q_rope: Tensor, rows: Tensor, chosen: Tensor, out: Tensor) -> None:
        """q [P, H, L], q_rope [P, H, R] of any strides of P and H, rows [anything, L + R], chosen int32 [P, K]:
        indices into `rows`, -1 read as 0 -> out [P, H, L], contiguous."""
        torch.clamp(chosen, min=0, out=self._chosen)
        latent = q.shape[2]
        pages = rows.unsqueeze(1)
        self._wrapper.run(query=(q, q_rope), kv_cache=(pages[..., :latent], pages[..., latent:]), out=out)
