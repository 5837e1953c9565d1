"""Where a rank reads encoder inputs on a GPU: on a stream of its own, beside the steps that decode.

What it writes are blocks that no step reads before the scheduler was told that they are there, which it is when the
host has waited for `ready`. What it overwrites may still be read by steps that were launched before: it begins behind
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class EncoderStream:
    """On a CPU everything runs where it is called."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: torch.cuda.Event | None = None  # of what was launched last; None: it is over

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within begins behind all that was launched before, and nothing later waits for it. Tensors
        that are made within belong to this stream: nobody else may read them on the device."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
            self.ready = torch.cuda.Event()
            self.ready.record()
