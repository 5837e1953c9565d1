"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), in torch int64 arithmetic.

A counter-based generator: the words are a pure function of (key, counter), so that a token's random number is the
same bits alone, in any batch, on any device and on any worker that replays the request.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words per counter. All tensors int64 holding 32-bit values, of shapes that broadcast; so are the results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low halves of the 64-bit product: int64 wraps, which leaves the low 64 bits right."""
    product = word * multiplier
    return (product >> 32) & MASK, product & MASK


def philox_scalar(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The same in plain integers: the reference of the reference."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel float32 from 32-bit words (int64), finite.

    -log(-log(1 - v)) with v = (word + 1/2) / 2^32: the resolution is finest where the winners of a race are.
    """
    v = (words.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v.clamp_(max=1.0 - 2.0**-24)))
