"""How clearly a reference model decided: of what is chosen by a nose, any two right programs may choose differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Margins(TorchFunctionMode):
    """While entered, sees every top-k and every greedy token, and keeps by how much the last of the chosen beat the
    first of the rest: tokens that the indexer chose, expert groups, experts, and output tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.smallest = float("inf")
        self.num_index_choices = 0  # queries that saw more tokens than the indexer may choose

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            k = kwargs["k"] if "k" in kwargs else args[1]
            within_a_group = args[0].dim() == 3 and k == 2  # only their sum matters
            if not within_a_group:
                self._see(args[0], k)
        elif func in (torch.argmax, Tensor.argmax) and args[0].is_floating_point():
            self._see(args[0], 1)
        return func(*args, **kwargs)

    def _see(self, scores: Tensor, k: int) -> None:
        if scores.shape[-1] <= k:
            return
        best = scores.topk(k + 1).values
        margins = (best[..., k - 1] - best[..., k])[best[..., k] != float("-inf")]
        if len(margins):
            self.smallest = min(self.smallest, margins.min().item())
            self.num_index_choices += margins.numel() if scores.dim() == 3 else 0
