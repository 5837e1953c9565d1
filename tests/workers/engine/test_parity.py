"""The engine against transformers, token for token, in fp32 on the CPU: one test per way a prompt gets its KV for two
families, one test of all ways at once for every other.

Only prompts whose reference run is decided clearly: a batch rounds otherwise than a single prompt, which may tip an
expert or a chosen token that won by a nose.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.support.checkpoints import DecidedRun, checkpoint, decided, ragged_prompts, transformers_model
from tests.support.engines import LoadedEngine, limits
from tests.support.margins import Margins
from workers.engine.scheduler import SchedulerLimits
from workers.models.loader import load

FAMILIES = ["llama", "deepseek-v32"]  # names of tests.support.families.FAMILIES
OTHERS = [
    "llama-mha-bias",
    "llama3-tied",
    "llama-linear",
    "llama-yarn",
    "qwen2",
    "qwen3",
    "qwen3-tied-bias",
    "qwen3-moe",
    "qwen3-moe-normalized",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3-yarn",
    "deepseek-v3-wide-fp8",
]
NUM_TOKENS = 64
NUM_PROMPTS = 8


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def engine(family: str, *, num_blocks: int = 256, scheduler_limits: SchedulerLimits | None = None) -> LoadedEngine:
    return LoadedEngine(load(checkpoint(family)), num_blocks=num_blocks, scheduler_limits=scheduler_limits)


def clear_runs(family: str, *, longest: int = 90, prefix: tuple[int, ...] = ()) -> list[DecidedRun]:
    candidates = (prompt for seed in range(4) for prompt in ragged_prompts(NUM_PROMPTS, longest=longest, seed=seed))
    return decided(family, tuple((*prefix, *prompt) for prompt in candidates), NUM_PROMPTS, NUM_TOKENS)


def expect_greedy(loaded: LoadedEngine, runs: list[DecidedRun]) -> None:
    """Runs the prompts together, and compares every token."""
    sequences = [loaded.add(run.prompt, max_tokens=NUM_TOKENS) for run in runs]
    loaded.run()
    for run, seq in zip(runs, sequences, strict=True):
        assert loaded.emitted(seq) == run.tokens
    seen = {token for seq in sequences for token in loaded.emitted(seq)}
    assert len(seen) >= 100, f"{len(seen)} different tokens prove little"
    loaded.scheduler.check_integrity()


def test_ragged_prompts_in_one_batch(family: str) -> None:
    loaded = engine(family, scheduler_limits=limits(max_batched_tokens=512, chunk_tokens=512))
    runs = clear_runs(family)
    expect_greedy(loaded, runs)
    if family == "deepseek-v32":
        assert sum(run.num_index_choices for run in runs) > 1500, "too little was sparse"
    assert max(len(outcome.tokens) for outcome in loaded.outcomes) == NUM_PROMPTS


def test_chunked_prompts_beside_decodes(family: str) -> None:
    loaded = engine(family, scheduler_limits=limits(max_batched_tokens=40, chunk_tokens=16))
    expect_greedy(loaded, clear_runs(family))
    num_chunks: dict[int, int] = {}
    for outcome in loaded.outcomes:
        for chunk in outcome.chunks:
            num_chunks[chunk.seq.id] = num_chunks.get(chunk.seq.id, 0) + 1
    assert sum(count >= 3 for count in num_chunks.values()) >= 3, num_chunks
    assert any(outcome.chunks and len(outcome.tokens) > len(outcome.chunks) for outcome in loaded.outcomes)


def test_prefix_hits(family: str) -> None:
    loaded = engine(family)
    shared = ragged_prompts(2, longest=50, seed=1)[-1]
    loaded.add(shared, max_tokens=2)
    loaded.run()
    extended = clear_runs(family, longest=60, prefix=tuple(shared))
    sequences = [loaded.add(run.prompt, max_tokens=NUM_TOKENS) for run in extended]
    loaded.run()
    for run, seq in zip(extended, sequences, strict=True):
        assert seq.prefix_hit_tokens > 0
        assert loaded.emitted(seq) == run.tokens
    assert len({token for seq in sequences for token in loaded.emitted(seq)}) >= 100


def test_preempted_and_recomputed(family: str) -> None:
    loaded = engine(family, num_blocks=26, scheduler_limits=limits(max_sequences=8))
    expect_greedy(loaded, clear_runs(family))
    assert sum(len(outcome.preempted) for outcome in loaded.outcomes) > 0


@pytest.mark.parametrize("other", OTHERS)
def test_every_way_at_once(other: str) -> None:
    """Prompts that share a cached prefix, in chunks beside decodes, in a pool too small for all of them."""
    loaded = engine(other, num_blocks=26, scheduler_limits=limits(max_batched_tokens=40, chunk_tokens=16))
    prefixes = tuple(tuple(ragged_prompts(2, longest=20, seed=seed)[-1]) for seed in range(8))
    shared = tuple(decided(other, prefixes, 1, 1)[0].prompt)
    loaded.add(shared, max_tokens=2)
    loaded.run()
    runs = clear_runs(other, longest=70, prefix=shared)
    first = len(loaded.outcomes)
    expect_greedy(loaded, runs)
    outcomes = loaded.outcomes[first:]
    hits = [chunk.seq.prefix_hit_tokens for outcome in outcomes for chunk in outcome.chunks]
    assert min(hits) > 0
    chunks = Counter(chunk.seq.id for outcome in outcomes for chunk in outcome.chunks)
    assert sum(count >= 3 for count in chunks.values()) >= 3, chunks
    assert any(outcome.chunks and len(outcome.tokens) > len(outcome.chunks) for outcome in outcomes)
    assert sum(len(outcome.preempted) for outcome in outcomes) > 0


def test_seeded_draws_alone_in_a_batch_in_chunks_and_after_replay(family: str) -> None:
    runs = clear_runs(family)
    prompts = [run.prompt for run in runs]
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_tokens": 24}
    loaded = engine(family, scheduler_limits=limits(max_batched_tokens=512, chunk_tokens=512))
    sequences = [loaded.add(prompt, seed=1000 + i, **options) for i, prompt in enumerate(prompts)]
    loaded.run()
    together = [loaded.emitted(seq) for seq in sequences]
    assert len({token for tokens in together for token in tokens}) >= 60
    assert together != [run.tokens[:24] for run in runs]
    for prompt, tokens in zip(prompts, together, strict=True):
        with Margins() as margins, torch.inference_mode():
            transformers_model(family)(torch.tensor([prompt + tokens]))
        assert margins.smallest > 1e-5, "nothing that this test needs: give the draws other seeds"

    chunked = engine(family, scheduler_limits=limits(max_batched_tokens=16, chunk_tokens=8))
    for i, prompt in enumerate(prompts):
        alone = chunked.add(prompt, seed=1000 + i, **options)
        chunked.run()
        assert chunked.emitted(alone) == together[i]
        chunked.blocks.clear_cache()
        replayed = chunked.add([*prompt, *together[i][:11]], num_prompt=len(prompt), seed=1000 + i, **options)
        chunked.run()
        assert chunked.emitted(replayed) == together[i][11:]
