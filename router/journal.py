"""What one traced request went through here: when it was sent where, what came back, why an attempt ended.

The router writes it on its loop, whoever made the request reads it at the end. Times are `time.monotonic()`, not the
loop's, which stands still while the loop is busy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cluster.errors import RequestError
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason
from router.plan import Plan


@dataclass(slots=True, kw_only=True)
class AttemptEntry:
    number: int
    plan: Plan
    is_replay: bool
    num_emitted_before: int  # tokens that earlier attempts brought: known input of this one
    leader: str  # the request whose plan it took, for they share a prompt; "": its own
    sent_at: float
    first_token_at: float | None = None
    ended_at: float | None = None
    num_tokens: int = 0  # that it brought
    failure: pb.Failure | None = None
    route: pb.Route | None = None
    stages: dict[int, pb.StageReport] = field(default_factory=dict)  # by number


@dataclass(slots=True, kw_only=True)
class Journal:
    """`traceparent`: the trace context that the words carry."""

    traceparent: str
    request_id: str = ""
    num_prompt_tokens: int = 0
    num_encoder_tokens: int = 0
    opened_at: float = 0.0
    admitted_at: float | None = None
    ended_at: float | None = None
    finish: FinishReason | None = None
    error: RequestError | None = None
    attempts: list[AttemptEntry] = field(default_factory=list)

    def opened(self, request_id: str, num_prompt_tokens: int, num_encoder_tokens: int) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_encoder_tokens = num_encoder_tokens
        self.opened_at = time.monotonic()

    def admitted(self) -> None:
        """Its turn has come."""
        self.admitted_at = time.monotonic()

    def sent(self, number: int, plan: Plan, *, is_replay: bool, num_emitted: int, leader: str) -> None:
        entry = AttemptEntry(
            number=number,
            plan=plan,
            is_replay=is_replay,
            num_emitted_before=num_emitted,
            leader=leader,
            sent_at=time.monotonic(),
        )
        self.attempts.append(entry)

    def heard(self, tokens: pb.SequenceTokens, num_new: int) -> None:
        """A frame of the running attempt, with so many tokens that were not known."""
        entry = self.attempts[-1]
        if num_new:
            entry.num_tokens += num_new
            if entry.first_token_at is None:
                entry.first_token_at = time.monotonic()
        if tokens.stages:  # of few frames
            for report in tokens.stages:
                entry.stages[report.number] = report
        if tokens.finish and tokens.HasField("route"):
            entry.route = tokens.route

    def failed(self, failure: pb.Failure) -> None:
        """The running attempt."""
        self.attempts[-1].failure = failure
        self.attempts[-1].ended_at = time.monotonic()

    def ended(self, finish: FinishReason | None, error: RequestError | None) -> None:
        """Neither: its client has enough, or is gone."""
        self.ended_at = time.monotonic()
        self.finish, self.error = finish, error
        if self.attempts and self.attempts[-1].ended_at is None:
            self.attempts[-1].ended_at = self.ended_at
