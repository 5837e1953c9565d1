"""Rotary position embeddings in the half-split convention: feature i is paired with i + D / 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies slowed by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin of a step's positions, each [T, 1, D / 2], in the dtype of the activations."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x [T, heads, D], rotated; a new tensor."""
        left, right = x.chunk(2, -1)
        return torch.cat((left * self.cos - right * self.sin, right * self.cos + left * self.sin), -1)


class RotaryEmbedding:
    """Frequencies of a model; holds no weight and follows the device of the positions."""

    def __init__(self, head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> None:
        # fp32 on the CPU whatever the model's dtype or device: a rounding of a frequency grows with the position.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = 1.0 / (theta**exponents)
        self.frequencies = frequencies if scaling is None else _llama3(frequencies, scaling)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """positions [T] int64."""
        angles = positions.view(-1, 1, 1).float() * self.frequencies.to(positions.device)
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


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
