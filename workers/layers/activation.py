"""Activations by the names that config.json gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final, TypeAlias

import torch.nn.functional as F
from torch import Tensor

Activation: TypeAlias = Callable[[Tensor], Tensor]

ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "swish": F.silu,
    }
)
