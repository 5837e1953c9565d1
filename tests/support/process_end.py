"""When the kernel has ended a process that was killed: until then its sockets are open."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import wait


def ended_at(pidfd: int, timeout_s: float) -> float:
    """By time.monotonic. Blocks, and closes `pidfd`, which is opened before the signal. Raises TimeoutError."""
    try:
        if not wait([pidfd], timeout_s):
            raise TimeoutError(f"a killed process has not ended within {timeout_s:g} s")
        return time.monotonic()
    finally:
        os.close(pidfd)
