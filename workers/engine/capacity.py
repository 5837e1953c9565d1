"""How the KV memory of a worker is shared out among its groups."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import ConfigError


def default_fixed_fraction(bytes_per_sequence: Sequence[int]) -> float:
    """Of the growing group and the fixed one, what each holds for a sequence of full length: both then hold as many."""
    growing, fixed = bytes_per_sequence
    return fixed / (growing + fixed)


def num_blocks_per_group(memory_bytes: int, block_bytes: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Blocks of each group in its share of the memory; the fractions add up to one.

    Raises ConfigError for a share that holds no block.
    """
    assert abs(sum(fractions) - 1.0) < 1e-9, f"{fractions} share out more or less than the memory"
    counts = [int(memory_bytes * share) // size for size, share in zip(block_bytes, fractions, strict=True)]
    for count, size, share in zip(counts, block_bytes, fractions, strict=True):
        if count < 1:
            raise ConfigError(
                "kv.memory_bytes",
                f"{int(memory_bytes * share)} bytes hold no block of {size} bytes; raise it, or lower kv.block_size",
            )
    return counts
