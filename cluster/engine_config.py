"""The section of the config that says where and with what a worker computes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.section import Section

Device = Literal["auto", "cpu", "cuda"]
Switch = Literal["deep_gemm", "flashinfer", "hopper", "triton", "trtllm-gen"]


class EngineConfig(Section):
    device: Device = "auto"
    """auto: the GPU that a worker sees, if it is one that our kernels are written for (Hopper), else the CPU; cuda: a
    GPU, and a worker that sees none does not start; pools then ask Ray for one GPU per worker unless they say
    otherwise."""
    strict: bool = False
    """A worker does not start with a slower backend than the fastest that there is for its model, or on the CPU where
    its pool has GPUs."""
    disabled: tuple[Switch, ...] = ()
    """Backends (hopper, trtllm-gen) and kernel libraries (deep_gemm, flashinfer, triton) that must not be used."""
    overlap: bool | None = None
    """Prepare the next step while one runs; none: on a GPU, unless tokens are guessed."""
    cuda_graphs: bool = True
    """Replay steps as CUDA graphs, where the backend can: those of single tokens; with encoders, of prompts, too."""
    speculation: Literal["ngram"] | None = None
    """ngram: guess that a text goes on as it did where its last few tokens stood before, and check the guesses in one
    step: the tokens stay what they are, in fewer steps where texts repeat themselves. None: no guesses."""
    draft_tokens: Annotated[int, Field(ge=1, le=32)] = 4
    """Guessed at a time, for one sequence; fewer where guesses prove wrong."""
    ngram_tokens: Annotated[int, Field(ge=1, le=16)] = 3
    """The last tokens of a text that must stand in it before, for a guess."""

    def overlaps(self, *, on_gpu: bool) -> bool:
        """Whether steps overlap on this device."""
        return on_gpu and self.speculation is None if self.overlap is None else self.overlap
