"""The KV memory of one rank: region storage and generation tables, allocated once and never moved.

Ownership: the worker owns the `KvPool` and keeps it alive for as long as any peer may read it (an owner whose pool
is unmapped under a read over TCP crashes). Typed views of the regions belong to the workers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from kvtransfer.layout import KvGeometry, RankLayout, RegionSpec

NULL_BLOCK = 0


class GenerationTable:
    """int64 [num_blocks] of one group in host memory, read by other processes while this one writes it.

    The rank raises the entry of a block before the first write into the reused block; a sink that reads the entry
    after the data therefore sees whether what it read was still there. Wherever the blocks are: a raise on the host
    comes before the launch of whatever writes them, and eight bytes of a busy GPU take many milliseconds to read.
    """

    def __init__(self, num_blocks: int) -> None:
        self.entries = torch.zeros(num_blocks, dtype=torch.int64)
        # The engine's thread applies step plans, the bytes thread applies pulls: read-max-write must not interleave.
        self._lock = threading.Lock()

    def raise_to(self, blocks: Sequence[int], generations: Sequence[int]) -> None:
        """Entries become the larger of what they are and `generations`. Any thread; repeated raises do nothing."""
        index = torch.tensor(blocks, dtype=torch.int64)
        wanted = torch.tensor(generations, dtype=torch.int64)
        with self._lock:
            self.entries.scatter_reduce_(0, index, wanted, "amax")


class KvPool:
    """`regions[group][region]`: uint8 [num_blocks, num_layers, page_bytes], null block included, zeroed.

    `generations[group]` lies beside it. `num_blocks[group]` counts the null block too.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        layout: RankLayout,
        regions: list[list[torch.Tensor]],
        generations: list[GenerationTable],
    ) -> None:
        self.geometry = geometry
        self.layout = layout
        self.regions = regions
        self.generations = generations

    @classmethod
    def allocate(
        cls,
        geometry: KvGeometry,
        layout: RankLayout,
        num_blocks: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> KvPool:
        """`num_blocks[group]` blocks of pool each, the null block comes on top."""
        where = torch.device(device)
        regions = [
            [
                torch.zeros(
                    count + 1, spec.num_layers, spec.page_bytes(layout.tp_size), dtype=torch.uint8, device=where
                )
                for spec in group.regions
            ]
            for group, count in zip(geometry.groups, num_blocks, strict=True)
        ]
        return cls(geometry, layout, regions, [GenerationTable(count + 1) for count in num_blocks])

    @property
    def num_blocks(self) -> list[int]:
        return [len(table.entries) for table in self.generations]

    def travelling(self, group: int) -> list[tuple[RegionSpec, torch.Tensor]]:
        """The regions of a group that sinks read, with their storage."""
        pairs = zip(self.geometry.groups[group].regions, self.regions[group], strict=True)
        return [(spec, storage) for spec, storage in pairs if spec.travels]

    @property
    def device(self) -> torch.device:
        """Of the regions."""
        return self.regions[0][0].device
