"""Plain values about a request that every part agrees on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from cluster.protos import worker_pb2 as pb


class RequestKey(NamedTuple):
    """A request and the attempt at it: a replay elsewhere is the next attempt."""

    request_id: str
    attempt: int

    @classmethod
    def of(cls, key: pb.RequestKey) -> RequestKey:
        return cls(key.request_id, key.attempt)

    def wire(self) -> pb.RequestKey:
        return pb.RequestKey(request_id=self.request_id, attempt=self.attempt)


class FinishReason(Enum):
    STOP = pb.STOP
    LENGTH = pb.LENGTH
    ERROR = pb.ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Together with (prompt, emitted) this determines every token."""

    max_tokens: int = 16  # counted over all attempts
    min_tokens: int = 0
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False

    @classmethod
    def of(cls, params: pb.SamplingParams) -> SamplingParams:
        return cls(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=params.seed,
            stop_token_ids=tuple(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
        )

    def wire(self) -> pb.SamplingParams:
        return pb.SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )
