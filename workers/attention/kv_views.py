"""From region storage (bytes) to the typed views that attention reads and writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtransfer.layout import GroupSpec, PageFormat, RegionSpec
from workers.attention.interface import KvCache


def page_view(region: RegionSpec, storage: Tensor, tp_size: int = 1) -> Tensor:
    """uint8 [num_blocks, num_layers, page_bytes] -> [num_blocks, num_layers, *page_shape] of the region's dtype.

    Shares memory. A page of fp8 values and scales stays bytes. Raises ValueError when the storage is not that of the
    region.
    """
    expected = (region.num_layers, region.page_bytes(tp_size))
    if storage.dtype != torch.uint8 or storage.dim() != 3 or tuple(storage.shape[1:]) != expected:
        raise ValueError(
            f"region {region.name}: storage is {storage.dtype} {list(storage.shape)}, "
            f"not uint8 [num_blocks, {expected[0]}, {expected[1]}]"
        )
    if region.page_format is PageFormat.FP8_VALUES_THEN_SCALES:
        return storage
    if region.page_format is PageFormat.KV_HEADS_FIRST:
        shape = (2, region.heads_of(0, tp_size).count, region.block_size, region.head_dim)
    else:
        shape = (region.block_size, region.row_size)
    return storage.view(getattr(torch, region.dtype)).view(len(storage), region.num_layers, *shape)


def kv_cache(group: GroupSpec, storages: Sequence[Tensor], tp_size: int = 1) -> KvCache:
    """The cache of one group from its regions' storages, in the order of `group.regions`."""
    pairs = zip(group.regions, storages, strict=True)
    return KvCache({region.name: page_view(region, storage, tp_size) for region, storage in pairs})
