"""What the goodput benchmark serves, and the load that it sends: one scenario for each model shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from benchmarks import checkpoint
from benchmarks.arrivals import Workload
from benchmarks.client import Sample
from benchmarks.gpu_shapes import SHAPES
from benchmarks.latency import Slo
from benchmarks.report import percentile
from cluster import config_file
from cluster.config import SluiceConfig

MODEL = "benchmark"
DISAGGREGATED = "disaggregated"
PREFILL_POOL = "prefill"
_BOTH_ROLES = ("prefill", "decode")


class Objectives(Slo):
    """Of the pauses between a request's tokens the 99th percentile counts, not the mean."""

    __slots__ = ()

    def kept_by(self, sample: Sample) -> bool:
        if not sample.complete or sample.token_s[0] > self.ttft_s:
            return False
        return percentile(sample.gaps, 0.99) <= self.inter_token_s


@dataclass(frozen=True, slots=True)
class App:
    """A cluster to measure; `budget` is scheduler.max_batched_tokens of an aggregated one."""

    config: SluiceConfig
    budget: int | None

    @property
    def label(self) -> str:
        return DISAGGREGATED if self.budget is None else f"aggregated, {self.budget}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Lengths are tokens, ends included. A decode worker never has more than `max_sequences` rows in a step."""

    name: str
    write: Callable[[Path], object]  # config.json into a directory
    settings: Mapping[str, object]  # of both modes, by dotted path
    vocab_size: int
    max_model_len: int
    chat_tokens: tuple[int, int]
    long_tokens: tuple[int, int]
    long_share: float
    output_tokens: tuple[int, int]
    lone_prompt_tokens: int  # of the requests one by one
    num_alone: int
    rates: tuple[float, ...]  # requests/s
    budgets: tuple[int, ...]  # of the aggregated mode; those that may not be reached in time come last
    seconds: float  # of arrivals at each rate
    warm_up_seconds: float
    largest_step: int  # tokens, of the disaggregated mode
    chunk_tokens: int  # of the disaggregated mode: a ticket follows each
    objectives: Objectives
    apps_at_once: int  # started side by side, and measured in turn
    transport: str = "auto"
    gpus: float | None = None  # of each worker, if not one
    seed: int = 0

    def apps(self, directory: Path) -> list[App]:
        """The disaggregated one first. `directory` must outlive them."""
        self.write(directory)
        shared = {
            "model.path": str(directory),
            "model.load_format": "dummy",
            "model.served_name": MODEL,
            "model.max_model_len": self.max_model_len,
            "transfer.transport": self.transport,
            "http.port": 0,
            "log.level": "warning",
            **self.settings,
        }
        share = {} if self.gpus is None else {"gpus": self.gpus}
        pools = {role: {"workers": 1, **share} for role in _BOTH_ROLES}
        two = {
            "pools": pools,
            "router.local_prefill": "never",
            "scheduler.max_batched_tokens": self.largest_step,
            "scheduler.chunk_tokens": self.chunk_tokens,
        }
        found = [App(config_file.load(None, settings={**shared, **two}), None)]
        for budget in self.budgets:
            one = {
                "pools": {"mixed": {"workers": 2, "roles": list(_BOTH_ROLES), **share}},
                "router.local_prefill": "always",
                "scheduler.max_batched_tokens": budget,
                "scheduler.chunk_tokens": budget,
                "transfer.transport": "auto",  # nothing moves
            }
            found.append(App(config_file.load(None, settings={**shared, **one}), budget))
        return found

    def lone(self, app: App) -> SluiceConfig:
        """An engine as the app's prefill worker has it, with room for a few prompts."""
        kv = app.config.kv
        assert kv.memory_bytes is not None
        less = kv.model_copy(update={"memory_bytes": kv.memory_bytes // 4})
        return app.config.model_copy(update={"kv": less})

    def workload(self, rate: float, series: int = 0) -> Workload:
        """Each series has prompts and times of its own, equal for all apps."""
        seconds = self.seconds if series == 0 else self.warm_up_seconds
        return Workload(
            rate=rate,
            num_requests=max(2, round(rate * seconds)),
            prompt_tokens=self.chat_tokens,
            output_tokens=self.output_tokens,
            vocab_size=self.vocab_size,
            seed=self.seed + series,
            long_prompt_tokens=self.long_tokens,
            long_share=self.long_share,
        )

    def alone(self) -> Workload:
        """One request after the other, all of one length."""
        length = self.lone_prompt_tokens
        return Workload(
            rate=0.0,
            num_requests=self.num_alone,
            prompt_tokens=(length, length),
            output_tokens=(4, 4),
            vocab_size=self.vocab_size,
            seed=self.seed,
        )


def _tiny() -> Scenario:
    return Scenario(
        name="tiny",
        write=partial(checkpoint.write, shape=checkpoint.TINY),
        settings=MappingProxyType({"engine.device": "cpu", "kv.memory_bytes": 64 << 20}),
        vocab_size=checkpoint.TINY.vocab_size,
        max_model_len=1024,
        chat_tokens=(16, 64),
        long_tokens=(256, 900),
        long_share=0.3,
        output_tokens=(8, 24),
        lone_prompt_tokens=256,
        num_alone=16,
        rates=(4.0, 8.0, 16.0),
        budgets=(64, 256, 1024),
        seconds=4.0,
        warm_up_seconds=1.0,
        largest_step=1024,
        chunk_tokens=256,
        objectives=Objectives(1.0, 0.010),
        apps_at_once=1,
    )


def _on_gpus(name: str, kv_bytes: int, rates: tuple[float, ...]) -> Scenario:
    """For two cards of 139 GiB. Two apps of V2-Lite and the lone engine fit on them; only one of these computes."""
    return Scenario(
        name=name,
        write=SHAPES[name].write,
        settings=MappingProxyType(
            {
                "engine.device": "cuda",
                "engine.strict": True,
                "kv.memory_bytes": kv_bytes,
                "scheduler.max_sequences": 64,
                # Kernels are compiled when they are first met, while the engine waits.
                "words.heartbeat_timeout_s": 60.0,
                "words.step_timeout_s": 60.0,
            }
        ),
        vocab_size=100_000,
        max_model_len=16384,
        chat_tokens=(100, 1000),
        long_tokens=(4096, 16000),
        long_share=0.3,
        output_tokens=(64, 256),
        lone_prompt_tokens=1024,
        num_alone=48,
        rates=rates,
        budgets=(4096, 8192, 2048, 1024, 512, 256),
        seconds=5.0,
        warm_up_seconds=3.0,
        largest_step=8192,
        chunk_tokens=2048,
        objectives=Objectives(1.0, 0.010),
        apps_at_once=2,
    )


def scenarios() -> dict[str, Scenario]:
    """By name."""
    lite = _on_gpus("v2-lite", 7 << 30, (3.0, 5.0, 7.0, 9.0, 12.0))
    fp8 = replace(lite, name="v2-lite-fp8", write=SHAPES["v2-lite-fp8"].write)
    qwen = _on_gpus("qwen3-8b", 24 << 30, (2.0, 4.0, 6.0, 8.0))
    return {each.name: each for each in (_tiny(), lite, fp8, qwen)}
