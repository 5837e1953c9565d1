"""Prompts whose blocks have known bytes, and requests between two workers, for the world of random failures."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cluster.request import RequestKey
from kvtransfer.connector import BlockRun
from tests.support.kv_builders import KvWorker, latent_geometry, logical_block

NUM_CHAINS = 6
MAX_PROMPT_BLOCKS = 5
GEOMETRY = latent_geometry(num_layers=1, block_size=2, row_size=2)
CONTENTS = range(1, NUM_CHAINS * MAX_PROMPT_BLOCKS + 1)
# Expected bytes of every content, per region: uint8 [content, block bytes]
BYTES = [
    np.stack([np.zeros(spec.block_bytes(), np.uint8), *(logical_block(spec, content) for content in CONTENTS)])
    for spec in GEOMETRY.groups[0].regions
]


def prompt(chain: int, num_blocks: int) -> list[int]:
    """Contents of a prompt's blocks. Chains come in threes that begin with the same two blocks."""
    families = [chain - chain % 3 if index < 2 else chain for index in range(num_blocks)]
    return [family * MAX_PROMPT_BLOCKS + index + 1 for index, family in enumerate(families)]


def hash_of(content: int) -> bytes:
    return content.to_bytes(16, "little")


@dataclass(slots=True, eq=False)
class Node:
    """A worker incarnation and the step counter that its fences use."""

    worker: KvWorker
    step: int = 1


@dataclass(slots=True, eq=False)
class Request:
    key: RequestKey
    contents: list[int]
    source: Node
    sink: Node
    theirs: list[int]  # blocks of the source's sequence; empty once it let go
    ours: list[int]  # blocks of the sink's sequence; empty once it let go
    num_computed: int
    first: int  # blocks that the sink had already
    num_ticketed: int
    arrived: set[int]
    tickets: list[tuple[BlockRun, ...]] = field(default_factory=list)

    @property
    def session(self) -> str:
        return f"{self.sink.worker.name}->{self.source.worker.name}"
