"""How the parts of a context that were attended apart become one result, in Triton. Reference:
workers.attention.merging. Logarithms are of base 2 throughout. Shapes: B sequences, H heads, V value size.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher


@triton.jit
def _merge(
    parts_ptr,
    lse_ptr,
    out_ptr,
    out_stride,
    lengths_ptr,
    below,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    ONLY_SHORT: tl.constexpr,
):
    follow()
    sequence = tl.program_id(0).to(tl.int64)
    if ONLY_SHORT and tl.load(lengths_ptr + sequence) >= below:
        return
    splits, features = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    first = tl.program_id(1) * PER_PROGRAM
    for head in range(first, tl.minimum(first + PER_PROGRAM, HEADS)):
        row = sequence * HEADS + head
        lse = tl.load(lse_ptr + row * SPLITS + splits)
        weights = tl.exp2(lse - tl.max(lse))
        weights = weights / tl.sum(weights)
        at = parts_ptr + (row * SPLITS + splits[:, None]) * SIZE + features[None, :]
        # A part that saw nothing was not written.
        parts = tl.load(at, mask=(lse > float("-inf"))[:, None], other=0.0)
        out = tl.sum(parts * weights[:, None], 0)
        tl.store(out_ptr + sequence * out_stride + head * SIZE + features, out.to(out_ptr.dtype.element_ty))


_launch_merge = Launcher(_merge)


def merge_splits(parts: Tensor, lse: Tensor, out: Tensor, lengths: Tensor | None = None, below: int = 0) -> None:
    """parts fp32 [B, H, splits, V], lse fp32 [B, H, splits] (-inf: saw nothing, at least one did not) -> out [B, H, V].

    With `lengths` [B] only sequences with a length under `below` are merged. Splits and V are powers of two.
    """
    num_sequences, heads, splits, size = parts.shape
    # Most programs have nothing to merge where few sequences are short, and starting them is what costs.
    per_program = 1 if lengths is None else 16
    arguments = (parts, lse, out, out.stride(0), lse if lengths is None else lengths, below)
    constants = {
        "SPLITS": splits,
        "HEADS": heads,
        "SIZE": size,
        "PER_PROGRAM": per_program,
        "ONLY_SHORT": lengths is not None,
    }
    _launch_merge(
        (num_sequences, -(-heads // per_program), 1),
        arguments,
        constants,
        num_warps=4 if splits * size > 512 else 1,
    )
