"""The first of the largest logits of each row, in two launches, in Triton. Reference: find_largest of
workers.engine.sampler. Shapes: N rows, V vocabulary.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.following import follow
from workers.kernels.launcher import Launcher, power_of_two

_PART = 4096  # logits of a program


@triton.jit(do_not_specialize=["vocabulary", "stride"], do_not_specialize_on_alignment=["logits_ptr"])
def _best_of_parts(logits_ptr, stride, vocabulary, values_ptr, ids_ptr, PART: tl.constexpr):
    follow()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = part * PART + tl.arange(0, PART)
    logits = tl.load(logits_ptr + row * stride + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("inf"))  # NaN is as bad, and compares
    value, at = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
    place = row * tl.num_programs(1) + part
    tl.store(values_ptr + place, value)
    tl.store(ids_ptr + place, part * PART + at)


@triton.jit(do_not_specialize=["num_parts"])
def _best_of_all(values_ptr, ids_ptr, num_parts, tokens_ptr, largest_ptr, is_valid_ptr, PARTS_UP: tl.constexpr):
    follow()
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS_UP)
    values = tl.load(values_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    value, at = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens_ptr + row, tl.load(ids_ptr + row * num_parts + at).to(tl.int64))
    tl.store(largest_ptr + row, value)
    tl.store(is_valid_ptr + row, tl.abs(value) < float("inf"))


_launch_parts, _launch_all = Launcher(_best_of_parts), Launcher(_best_of_all)


def largest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V], rows of any stride -> token ids [N] int64, their logits [N] float32, and [N] bool: whether these
    are finite. Where a logit is NaN or +inf, or all are -inf, they are not, and the token means nothing."""
    rows, vocabulary = logits.shape
    num_parts = -(-vocabulary // _PART)
    values = torch.empty(rows, num_parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, num_parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    is_valid = torch.empty(rows, dtype=torch.bool, device=logits.device)
    assert logits.stride(1) == 1, "the vocabulary lies side by side"
    arguments = (logits, logits.stride(0), vocabulary, values, ids)
    _launch_parts((rows, num_parts, 1), arguments, {"PART": _PART}, num_warps=4)
    arguments = (values, ids, num_parts, tokens, found, is_valid)
    _launch_all((rows, 1, 1), arguments, {"PARTS_UP": power_of_two(num_parts)}, num_warps=1)
    return tokens, found, is_valid
