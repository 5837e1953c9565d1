"""Which blocks with an encoder's output hold what decoders read of it, where encoders hand over their hidden states.

    states written, here or by a read ──▶ READY ──the first plan that tells of a decoder's table──▶ projected, when
                                                                                                   the step has settled

A step that fails has projected nothing; until one has settled, those that come with the same output project it again.
A block that was reused is another one: generations tell. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from workers.engine.block_manager import BlockManager
from workers.engine.sequence import Sequence
from workers.engine.step_plan import Projection


class Projections:
    """Of one shard."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._groups = [index for index, group in enumerate(blocks.groups) if group.is_projected]
        self._done: dict[tuple[int, int], int] = {}  # (group, block) -> its generation then

    def lacking(self, seq: Sequence) -> list[Projection]:
        """What is to be projected before a step reads the blocks of a sequence."""
        if not self._groups or seq.encoder_input is None:
            return []
        num_tokens = len(seq.encoder_input.tokens)
        lacking: list[Projection] = []
        for group in self._groups:
            size = self._blocks.groups[group].block_size
            for index, block in enumerate(seq.block_tables[group]):
                if self._done.get((group, block)) != self._blocks.generation(group, block):
                    lacking.append(Projection(group, block, min(size, num_tokens - index * size)))
        return lacking

    def of(self, rows: Iterable[Projection]) -> Mapping[tuple[int, int], int]:
        """What `settle` has to remember of a plan's rows: a block may be another one by then."""
        return {(group, block): self._blocks.generation(group, block) for group, block, _ in rows}

    def settle(self, projected: Iterable[tuple[Sequence, Mapping[tuple[int, int], int]]]) -> None:
        """The step of these is over. What a sequence projected that has ended meanwhile is not trusted: its step may
        have failed."""
        for seq, generations in projected:
            if not seq.is_finished:
                self._done.update(generations)
