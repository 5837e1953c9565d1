"""Drawing the next tokens: greedy, temperature, top-k, top-p, min-p, as one pure function.

A draw is the argmax of (logits / temperature + Gumbel noise) over the tokens that the limits leave. The noise
of a token is Philox4x32-10 of key `seed` and counter (token id // 4, position, sample, 0), word token id % 4: the
same bits for the same (seed, sample, position, token id), alone or in any batch, whole or split over the vocabulary.

Shapes: N drawing rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.philox import gumbel, philox

# Rows x V that are drawn together: the working set of the noise stays inside a core's cache; a GPU wants many.
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 23}
_PARTS = 64  # of a row whose largest is sought on a GPU


@dataclass(frozen=True, slots=True)
class Draws:
    """One entry per drawing row, host arrays of length N."""

    temperature: npt.NDArray[np.float32]  # 0: greedy
    top_k: npt.NDArray[np.int64]  # 0: off
    top_p: npt.NDArray[np.float32]  # 1: off
    min_p: npt.NDArray[np.float32]  # 0: off
    seed: npt.NDArray[np.uint64]
    sample: npt.NDArray[np.int64]  # which of a request's n sequences
    position: npt.NDArray[np.int64]  # index of the drawn token in prompt + emitted


class Drawn(NamedTuple):
    tokens: Tensor  # [N] int64
    is_valid: Tensor  # [N] bool: False where the logits hold NaN or +inf, or nothing but -inf; the token means nothing


# [N, V] -> of each row the first of the largest logits [N] int64, that logit [N] float32, and whether it is finite [N]
# bool, which it is not where the row holds NaN or +inf, or nothing but -inf: the token then means nothing.
FindLargest = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def find_largest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A `FindLargest`; the reference of workers.kernels.largest."""
    tokens = _argmax(logits)  # NaN is the largest
    largest = logits.gather(1, tokens[:, None])[:, 0].float()
    return tokens, largest, largest.isfinite()


def sample(logits: Tensor, draws: Draws, find: FindLargest = find_largest) -> Drawn:
    """Token ids on the logits' device, from logits [N, V] of any float dtype; -inf where a token must not be drawn.

    Pure: row i of the result depends on row i of the arguments only. Equal scores go to the lowest token id.
    """
    drawing = np.flatnonzero(draws.temperature > 0)
    tokens, largest, is_valid = find(logits)
    if drawing.size:
        rows_per_chunk = max(1, _CHUNK_ELEMENTS[logits.device.type] // logits.shape[1])
        edges = [*range(0, drawing.size, rows_per_chunk), drawing.size]
        for start, end in pairwise(edges):
            rows = drawing[start:end]
            tokens[_tensor(rows, logits)] = _draw(logits, largest, draws, rows)
    return Drawn(tokens, is_valid)


def _argmax(logits: Tensor) -> Tensor:
    """The first of the largest of each row."""
    rows, vocabulary = logits.shape
    if logits.device.type == "cpu" or vocabulary % _PARTS:
        return logits.argmax(dim=-1)
    # A GPU gives a row to one block of threads, which is slow on few long rows: parts of rows first.
    best = logits.view(rows, _PARTS, -1).argmax(dim=-1)  # [N, parts]
    ids = best + torch.arange(0, vocabulary, vocabulary // _PARTS, device=logits.device)
    winner = logits.gather(1, ids).argmax(dim=-1, keepdim=True)
    return ids.gather(1, winner)[:, 0]


def _draw(logits: Tensor, largest: Tensor, draws: Draws, rows: npt.NDArray[np.intp]) -> Tensor:
    at = _tensor(rows, logits)
    scores = logits[at].float() - largest[at][:, None]  # at most 0: no temperature is too low for it
    scores /= _tensor(draws.temperature[rows], logits)[:, None]
    top_k, top_p, min_p = draws.top_k[rows], draws.top_p[rows], draws.min_p[rows]
    limited = (top_k > 0) | (top_p < 1)
    if limited.any():
        at = _tensor(np.flatnonzero(limited), logits)
        scores[at] = limit_mass(scores[at], _tensor(top_k[limited], logits), _tensor(top_p[limited], logits))
    if min_p.any():
        scores = limit_ratio(scores, _tensor(min_p, logits))
    noise = token_noise(
        scores.shape[1], draws.seed[rows], draws.sample[rows], draws.position[rows], device=logits.device
    )
    return scores.add_(noise).argmax(dim=-1)


def limit_mass(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf for the tokens outside top-k, then outside the smallest set of at least top_p mass. [N, V].

    Tokens equal to the last one kept stay: the result does not depend on how a sort breaks ties.
    """
    vocabulary = scores.shape[1]
    ordered = scores.sort(dim=-1, descending=True).values
    keep = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)
    kth = ordered.gather(1, keep[:, None] - 1)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    mass_before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    mass_before[:, 0] = 0.0  # the first token always stays
    num_kept = (mass_before < top_p[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    nucleus = torch.where(top_p[:, None] < 1, ordered.gather(1, num_kept - 1), kth)
    # Both: rounding may carry the mass of top-k to just under top_p, and the nucleus past the k-th.
    return scores.masked_fill(scores < torch.maximum(kth, nucleus), -torch.inf)


def limit_ratio(scores: Tensor, min_p: Tensor) -> Tensor:
    """-inf for the tokens of less than min_p times the probability of the most likely one. [N, V], largest 0."""
    return scores.masked_fill(scores < min_p.log().clamp(max=0.0)[:, None], -torch.inf)


def token_noise(
    vocabulary: int,
    seed: npt.NDArray[np.uint64],
    sample_: npt.NDArray[np.int64],
    position: npt.NDArray[np.int64],
    *,
    device: torch.device,
) -> Tensor:
    """Gumbel noise [N, V] float32 of the draws (seed, sample, position), each [N]."""
    halves = ((seed & 0xFFFFFFFF).astype(np.int64), (seed >> 32).astype(np.int64))
    key = tuple(_move(half, device)[:, None] for half in halves)
    place, which = (_move(value, device)[:, None] for value in (position, sample_))
    block = torch.arange((vocabulary + 3) // 4, device=device)[None, :]
    words = philox((block, place, which, torch.zeros_like(which)), (key[0], key[1]))
    shape = (len(seed), block.shape[1])
    return gumbel(torch.stack([word.expand(shape) for word in words], dim=-1).flatten(1)[:, :vocabulary])


def _tensor(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    return _move(values, like.device)


def _move(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Without waiting for the device: the host is to prepare the next step meanwhile."""
    return torch.from_numpy(values).to(device, non_blocking=True)
