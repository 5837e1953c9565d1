"""Attention of each query over latent rows of its own choice, in plain torch.

Shapes: P queries, K chosen rows of each, H query heads, L latent size, R rotary size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GATHERED = 1 << 24  # elements of chosen rows that are copied at a time


def attend_chosen(queries: Tensor, rows: Tensor, chosen: Tensor, *, latent_size: int, scale: float) -> Tensor:
    """queries [P, H, L + R], rows [anything, L + R], chosen [P, K] int64 -> [P, H, L].

    `chosen` are indices into `rows`, the first of each query valid, -1 for none. Softmax over the chosen rows; all
    heads share them, and their first L features are the values.
    """
    num_queries, num_chosen = chosen.shape
    step = max(1, MAX_GATHERED // (num_chosen * rows.shape[1]))
    parts = [
        _attend(queries[start : start + step], rows, chosen[start : start + step], scale)
        for start in range(0, num_queries, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[..., :latent_size]


def _attend(queries: Tensor, rows: Tensor, chosen: Tensor, scale: float) -> Tensor:
    mask = None
    missing = chosen < 0
    if missing.any():
        # A row of the query's own, so that nobody else's bytes are multiplied, not even by 0.
        chosen = torch.where(missing, chosen[:, :1], chosen)
        mask = queries.new_zeros(missing.shape).masked_fill_(missing, float("-inf"))[:, None, None]
    keys = rows.index_select(0, chosen.flatten()).view(len(chosen), 1, chosen.shape[1], -1)
    # The heads are query rows of one head. Values are whole rows, cut afterwards: equal sizes run fused.
    return F.scaled_dot_product_attention(queries.unsqueeze(1), keys, keys, attn_mask=mask, scale=scale).squeeze(1)
