"""What steps, reads and words take on one kind of worker: a few measured numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from workers.engine.step_plan import ScheduledSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds, unless the name says otherwise. A row of one token decodes; a longer one is a chunk of a prompt.

    step = fixed
         + sum over chunks: tokens * (prompt_token + attention * context in the middle of the chunk)
         + sum over decoding rows: sequence + context_token * context
    read = read + bytes / bytes_per_s; reads of one worker follow one another
    """

    fixed: float
    prompt_token: float
    attention: float
    sequence: float
    context_token: float
    read: float
    bytes_per_s: float
    block_bytes: int
    words: float  # one way of a frame
    front: float = 0.0  # of a request, in the ingress, before it is routed

    def step_s(self, rows: Iterable[ScheduledSequence]) -> float:
        seconds = self.fixed
        for row in rows:
            if row.num_tokens == 1:
                seconds += self.sequence + self.context_token * row.start
            else:
                middle = row.start + row.num_tokens / 2
                seconds += row.num_tokens * (self.prompt_token + self.attention * middle)
        return seconds

    def read_s(self, num_blocks: int) -> float:
        return self.read + num_blocks * self.block_bytes / self.bytes_per_s

    @classmethod
    def load(cls, path: Path) -> StepCost:
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


# An H200 with the Qwen3-8B shape in bf16, 64 tokens a block. From benchmarks/baselines: 4.75 ms a token of one request,
# 15.4 ms a step of 128 requests with 2048 to 2176 tokens, of which reading their KV at 4.29 TB/s is 9.6 ms; 27.1 us a
# token of 8192-token prompts, of which attention at 500 TFLOP/s is 4.8 us. Assumed: reads over one 400 Gb/s link a
# worker at 80 % of its rate, 0.2 ms for words one way.
_H200: Final = StepCost(
    fixed=4.7e-3,
    prompt_token=22.3e-6,
    attention=1.18e-9,
    sequence=8.6e-6,
    context_token=34.4e-9,
    read=0.5e-3,
    bytes_per_s=40e9,
    block_bytes=64 * 36 * 2 * 8 * 128 * 2,
    words=0.2e-3,
    front=2e-3,
)
COSTS: Final[Mapping[str, StepCost]] = MappingProxyType({"h200-8b": _H200})
