"""How many blocks the KV pool of a worker holds: what the config says, or a share of the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from cluster.config import KvConfig
from cluster.errors import ConfigError
from kvtransfer.layout import GroupSpec
from workers.engine.capacity import default_fixed_fraction, num_blocks_per_group

_HOST_FRACTION = 0.1
_GPU_FRACTION = 0.9


class FreeMemory(NamedTuple):
    """What a pool may take of, and the share of it that it takes unless the config says another one."""

    num_bytes: int
    fraction: float
    is_hard: bool  # more than that is refused; a host's figure is an estimate

    @classmethod
    def of_host(cls) -> FreeMemory:
        return cls(psutil.virtual_memory().available, _HOST_FRACTION, is_hard=False)

    @classmethod
    def of_gpu(cls, device: torch.device, *, reserved_bytes: int, num_gpus: float) -> FreeMemory:
        """After the largest step, whose memory torch keeps. `reserved_bytes` will be needed later; of a GPU that
        workers share (`num_gpus` < 1) each has its part."""
        free, total = torch.cuda.mem_get_info(device)
        if 0 < num_gpus < 1:
            free = min(free, int(total * num_gpus) - torch.cuda.memory_reserved(device))
        return cls(max(0, free - reserved_bytes), _GPU_FRACTION, is_hard=True)


def num_blocks(
    kv: KvConfig,
    groups: Sequence[GroupSpec],
    max_lens: Sequence[int],
    free: FreeMemory,
    *,
    pool: str,
    pool_blocks: int | None,
) -> list[int]:
    """Blocks per group, the null block not counted. `max_lens`: tokens that each holds for a sequence of full length;
    `pool_blocks`: what the worker's pool says. Raises ConfigError for more than fits a GPU, or nothing at all."""
    block_bytes = [group.block_bytes() for group in groups]
    if (count := pool_blocks or kv.num_blocks) is not None:
        key = f"pools.{pool}.num_blocks" if pool_blocks else "kv.num_blocks"
        most = max(0, free.num_bytes // sum(block_bytes) - 1)
        if free.is_hard and count > most:
            raise ConfigError(key, f"{count} blocks of {_mb(sum(block_bytes))}, but {_left(free)}; lower it to {most}")
        return [count] * len(groups)
    if free.is_hard and kv.memory_bytes is not None and kv.memory_bytes > free.num_bytes:
        raise ConfigError("kv.memory_bytes", f"{kv.memory_bytes}, but {_left(free)}; lower it to {free.num_bytes}")
    memory = kv.memory_bytes or int(free.num_bytes * (kv.memory_fraction or free.fraction))
    if free.is_hard and memory < 2 * sum(block_bytes):
        raise ConfigError("kv.memory_fraction", f"{_left(free)}, too little for blocks of {_mb(sum(block_bytes))}")
    if len(groups) == 1:
        return num_blocks_per_group(memory, block_bytes, [1.0])
    full = [size * -(-n // group.block_size) for size, n, group in zip(block_bytes, max_lens, groups, strict=True)]
    fixed = default_fixed_fraction(full) if kv.cross_kv_fraction is None else kv.cross_kv_fraction
    return num_blocks_per_group(memory, block_bytes, [1.0 - fixed, fixed])


def _left(free: FreeMemory) -> str:
    return f"the model and its largest step leave {free.num_bytes / 1e9:.1f} GB of the GPU"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"
