"""What a chaos run writes down: one JSON object a line, judged afterwards by who was not there.

Times are seconds since the run began, of CLOCK_MONOTONIC, which all processes of one machine share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(Line):
    """How the run was set up; the first line."""

    kind: Literal["run"] = "run"
    seed: int
    commit: str
    num_faults: int  # wanted
    heartbeat_timeout_s: float
    step_timeout_s: float
    left_out: dict[str, str] = {}  # kind of fault: why this machine cannot have it


class Expected(Line):
    """What the oracle says: transformers in fp32, and the sampler's reference."""

    kind: Literal["expected"] = "expected"
    question: int
    sample: int
    num_prompt_tokens: int
    seeded: bool
    tokens: tuple[int, ...]


class Asked(Line):
    """A client sent a request. `cancel_after`: it goes away when it has so many tokens."""

    kind: Literal["asked"] = "asked"
    at_s: float
    request: str
    question: int
    sample: int
    ingress: str  # incarnation
    storm: bool = False
    cancel_after: int | None = None


class Got(Line):
    """A client received tokens."""

    kind: Literal["got"] = "got"
    at_s: float
    request: str
    first_index: int
    tokens: tuple[int, ...]


Outcome = Literal["ok", "cancelled", "refused", "failed"]


class Ended(Line):
    """A client knows that its request is over. `workers`: the names of all that were planned for it."""

    kind: Literal["ended"] = "ended"
    at_s: float
    request: str
    outcome: Outcome
    error: str = ""
    num_attempts: int = 0
    workers: tuple[str, ...] = ()


class Fault(Line):
    """What was done to whom, and in what state it was seen last."""

    kind: Literal["fault"] = "fault"
    at_s: float
    number: int
    what: str
    victims: tuple[str, ...]  # names
    incarnations: tuple[str, ...]
    pids: tuple[int, ...]
    state: str
    seen: str  # what the state was read from
    busy: float  # share of all cores in use since the fault before


class Healed(Line):
    """The victim runs again, or its successor serves; and everything that was open at the fault has ended."""

    kind: Literal["healed"] = "healed"
    at_s: float
    number: int


class Notice(Line):
    """A survivor acted on a broken session: a worker on its engine thread, an ingress in its event loop."""

    kind: Literal["notice"] = "notice"
    at_s: float
    peer: str  # incarnation
    by: str  # name
    reason: str


class Rest(Line):
    """One worker when nobody asked for anything; `cleared`: after its cache was emptied."""

    kind: Literal["rest"] = "rest"
    at_s: float
    worker: str
    cleared: bool
    num_blocks: int
    free: int
    filling: int
    ready: int
    cached: int
    quarantined: int
    leases: int
    num_requests: int


class Death(Line):
    """A process ended that nobody had killed."""

    kind: Literal["death"] = "death"
    at_s: float
    name: str
    exit_code: int


class Gone(Line):
    """The kernel had ended a process that was killed: until then its sockets were open."""

    kind: Literal["gone"] = "gone"
    at_s: float
    pid: int


class End(Line):
    """The run came to its end; the last line."""

    kind: Literal["end"] = "end"
    at_s: float
    num_workers: int


Record = Annotated[
    Run | Expected | Asked | Got | Ended | Fault | Healed | Notice | Rest | Death | Gone | End,
    Field(discriminator="kind"),
]
_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


class Report:
    """Writes; any thread."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._lock = threading.Lock()

    def add(self, line: Line) -> None:
        text = line.model_dump_json(exclude_defaults=False)
        with self._lock:
            self._file.write(text + "\n")

    def close(self) -> None:
        with self._lock:
            self._file.close()


class UnreadableReport(ValueError):
    """A line that is no record; a report is judged whole or not at all."""


def read(path: Path) -> Iterator[Record]:
    """Raises UnreadableReport."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                yield _RECORD.validate_json(line)
            except ValidationError as error:
                raise UnreadableReport(f"{path}:{number}: {error.errors()[0]['msg']}: {line[:100]!r}") from None
