"""KV blocks of one prompt on their way here: which of them have come, from whom the others are awaited.

A fetch outlives its source: a second source is asked for what the first did not deliver. Plain values; the
decode stage sends and receives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.session import Session
from kvtransfer.connector import BlockPair, BlockRaise, BlockSpan

SILENT_READ_S = 0.5  # the reads of a dead process fail at once, those over a cut link perhaps never


@dataclass(slots=True)
class Fetch:
    """The KV of `num_tokens` tokens is wanted in `destinations`, at most one span per group, reserved and FILLING; none
    where only the handoff is wanted."""

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
    lost_at: float = 0.0
    in_flight: set[int] = field(default_factory=set)  # ids of pulls whose end we wait for
    under_it: bool = False  # the source died or failed while it computed this prompt: the prompt is a suspect
    parked: bool = False  # until it is its turn to ask another source
    blocks_stuck: bool = False  # destination blocks that may still be written
    _missing: dict[int, dict[int, int]] = field(default_factory=dict)  # by group: destination block -> its position
    _reading_since: float | None = None

    def __post_init__(self) -> None:
        self._missing = {
            span.group: {block: span.first_index + offset for offset, block in enumerate(span.blocks)}
            for span in self.destinations
        }

    @property
    def complete(self) -> bool:
        return self.last_ticket and not any(self._missing.values())

    @property
    def awaits_source(self) -> bool:
        """Whether a source computes the prompt, as far as is known."""
        return self.session is not None and not self.last_ticket and not self.source_lost

    def valid_blocks(self) -> int:
        """Length of the prefix, in blocks, that is here in every group."""
        ends = ((span.group, span.first_index + len(span.blocks)) for span in self.destinations)
        return min(min(self._missing[group].values(), default=end) for group, end in ends)

    def begin(self, session: Session, ask: int, now: float) -> None:
        """A source is asked, for everything from the valid prefix on."""
        self.session = session
        self.ask = ask
        self.asked_at = now
        self.tried.add(session.peer.incarnation)
        self.had_ticket = self.last_ticket = False
        self.source_lost = ""
        self.under_it = False

    def lose(self, reason: str, now: float, *, died: bool) -> None:
        """The source is given up. `died`: or its step failed; that counts until its last ticket is here."""
        if not self.source_lost:
            self.lost_at = now
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

    def begin_read(self, pull_id: int, now: float) -> None:
        self.in_flight.add(pull_id)
        if self._reading_since is None:
            self._reading_since = now

    def landed(self, pairs: Iterable[BlockPair]) -> None:
        """These destination blocks hold what the source had."""
        for group, _, block in pairs:
            self._missing[group].pop(block, None)

    def end_read(self, pull_id: int, now: float) -> float:
        """Once the last read has ended: seconds since the first of them began; 0 before."""
        self.in_flight.discard(pull_id)
        if self.in_flight or self._reading_since is None:
            return 0.0
        since, self._reading_since = self._reading_since, None
        return now - since

    def is_silent(self, now: float) -> bool:
        """Whether reads from a source whose session broke have not ended when they should have."""
        broken = self.session is not None and not self.session.open
        return bool(self.source_lost and self.in_flight) and broken and now - self.lost_at > SILENT_READ_S

    def give_up_reads(self) -> None:
        """They may never report: their blocks are theirs until the ledger lets go, and others must be reserved."""
        self.in_flight.clear()
        self.blocks_stuck = True


class Lingering:
    """Asks that nobody waits for any more, with reads in flight: the source hears the release after the last one."""

    def __init__(self) -> None:
        self._asks: dict[RequestKey, tuple[Session, int, set[int]]] = {}

    def __len__(self) -> int:
        return len(self._asks)

    def add(self, key: RequestKey, session: Session, ask: int, reads: set[int]) -> None:
        self._asks[key] = (session, ask, reads)

    def ended(self, key: RequestKey, pull_id: int) -> bool:
        """A read is over; whether it was one of these."""
        if key not in self._asks:
            return False
        session, ask, reads = self._asks[key]
        reads.discard(pull_id)
        if not reads:
            del self._asks[key]
            session.send(pb.Frame(release=pb.Release(key=key.wire(), ask=ask)))
        return True
