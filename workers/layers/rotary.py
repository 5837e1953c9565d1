"""Rotary position embeddings. Half-split pairs feature i with i + D / 2, interleaved pairs 2i with 2i + 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every frequency slowed by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies slowed by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Frequencies that turn fewer than `beta_slow` times in the original context slowed by `factor`, those that turn
    more than `beta_fast` times kept, those between blended; cos and sin times `attention_factor`. The bounds are moved
    outwards to whole features with `truncate`."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    attention_factor: float
    truncate: bool = True


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much YaRN sharpens attention: 1 where the context is not stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin of a step's positions, each [T, 1, D / 2], in the dtype of the activations."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x [T, heads, D], half-split, rotated; a new tensor."""
        left, right = x.chunk(2, -1)
        return torch.cat((left * self.cos - right * self.sin, right * self.cos + left * self.sin), -1)

    def apply_interleaved(self, x: Tensor) -> Tensor:
        """x [T, heads, D], interleaved, rotated in place of its features; a new tensor."""
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * self.cos - odd * self.sin, odd * self.cos + even * self.sin), -1).flatten(-2)


class RotaryEmbedding:
    """Frequencies of a model; holds no weight and follows the device of the positions."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        # fp32 on the CPU whatever the model's dtype or device: a rounding of a frequency grows with the position.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = 1.0 / (theta**exponents)
        self.magnitude = 1.0  # of cos and sin
        if isinstance(scaling, LinearScaling):
            frequencies = frequencies / scaling.factor
        elif isinstance(scaling, Llama3Scaling):
            frequencies = _llama3(frequencies, scaling)
        elif isinstance(scaling, YarnScaling):
            frequencies = _yarn(frequencies, theta, scaling)
            self.magnitude = scaling.attention_factor
        self.frequencies = frequencies

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """positions [T] int64."""
        angles = positions.view(-1, 1, 1).float() * self.frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1.0:
            cos, sin = cos * self.magnitude, sin * self.magnitude
        return Rotation(cos.to(dtype), sin.to(dtype))


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    lengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    longest_kept = original / scaling.high_freq_factor
    shortest_slowed = original / scaling.low_freq_factor
    slowed = torch.where(lengths > shortest_slowed, frequencies / scaling.factor, frequencies)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = (original / lengths - scaling.low_freq_factor) / span
    blended = (1 - kept) * slowed / scaling.factor + kept * slowed
    between = (lengths >= longest_kept) & (lengths <= shortest_slowed)
    return torch.where(between, blended, slowed)


def _yarn(frequencies: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    head_dim = 2 * len(frequencies)

    def feature(turns: float) -> float:
        """Which feature turns that often in the original context."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = (torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device) - low) / span
    slowed = ramp.clamp_(0, 1)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed)
