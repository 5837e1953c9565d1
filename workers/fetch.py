"""KV blocks of one prompt on their way here: which of them have come, from whom the others are awaited.

A fetch outlives its source: a second source is asked for what the first did not deliver. Plain values; the
decode stage sends and receives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.session import Session
from kvtransfer.connector import BlockPair, BlockRaise, BlockSpan


@dataclass(slots=True)
class Fetch:
    """The KV of `num_tokens` tokens is wanted in `destinations`, one span per group, reserved and FILLING."""

    num_tokens: int
    destinations: tuple[BlockSpan, ...]
    raises: tuple[BlockRaise, ...]  # of the destinations; leave with the first pull
    session: Session | None = None  # of the source being asked
    ask: int = 0
    asked_at: float = 0.0
    tried: set[str] = field(default_factory=set)  # incarnations of sources
    had_ticket: bool = False
    last_ticket: bool = False
    source_lost: str = ""  # why the source is given up, once its reads have ended
    under_it: bool = False  # the source died or failed while it computed this prompt: the prompt is a suspect
    blocks_stuck: bool = False  # destination blocks that may still be written
    _missing: list[dict[int, int]] = field(default_factory=list)  # [group] destination block -> its position
    _reading_since: float | None = None

    def __post_init__(self) -> None:
        self._missing = [
            {block: span.first_index + offset for offset, block in enumerate(span.blocks)} for span in self.destinations
        ]

    @property
    def complete(self) -> bool:
        return self.last_ticket and not any(self._missing)

    def valid_blocks(self) -> int:
        """Length of the prefix, in blocks, that is here in every group."""
        ends = (span.first_index + len(span.blocks) for span in self.destinations)
        return min(min(missing.values(), default=end) for missing, end in zip(self._missing, ends, strict=True))

    def begin(self, session: Session, ask: int, now: float) -> None:
        """A source is asked, for everything from the valid prefix on."""
        self.session = session
        self.ask = ask
        self.asked_at = now
        self.tried.add(session.peer.incarnation)
        self.had_ticket = self.last_ticket = False
        self.source_lost = ""
        self.under_it = False

    def lose(self, reason: str, *, died: bool) -> None:
        """The source is given up. `died`: or its step failed; that counts until its last ticket is here."""
        self.source_lost = reason
        self.under_it = died and not self.last_ticket

    def wanted(self) -> list[BlockSpan]:
        """The destinations from the valid prefix on."""
        first = self.valid_blocks()
        return [
            BlockSpan(span.group, max(first, span.first_index), span.blocks[max(0, first - span.first_index) :])
            for span in self.destinations
        ]

    def take_raises(self) -> tuple[BlockRaise, ...]:
        """Pulls are executed in order: the first one raises for all."""
        raises, self.raises = self.raises, ()
        return raises

    def begin_read(self, now: float) -> None:
        if self._reading_since is None:
            self._reading_since = now

    def landed(self, pairs: Iterable[BlockPair]) -> None:
        """These destination blocks hold what the source had."""
        for group, _, block in pairs:
            self._missing[group].pop(block, None)

    def end_read(self, now: float) -> float:
        """Seconds since the first of the reads that have now all ended."""
        since, self._reading_since = self._reading_since, None
        return 0.0 if since is None else now - since
