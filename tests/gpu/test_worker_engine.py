"""The engine of a worker on a GPU, put together as the config says: what it computes, what it holds, what it frees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from cluster.errors import ConfigError
from cluster.request import SamplingParams
from tests.support.gpu_workers import (
    BLOCK_SIZE,
    FAMILIES,
    VOCAB_SIZE,
    assembled,
    driver,
    reference_logprobs,
    write_checkpoint,
)
from workers.assembly import Assembly
from workers.engine.overlap import OverlappedEngine
from workers.engine.sequence import Sequence

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def prompt(random: Random, length: int) -> list[int]:
    return [random.randrange(1, VOCAB_SIZE) for _ in range(length)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def parts(folder: Path) -> Iterator[Assembly]:
    made = assembled(folder)
    yield made
    for executor in made.executors:
        executor.stop()


def test_what_the_config_asks_for_is_what_runs(parts: Assembly) -> None:
    assert parts.pool.device.type == "cuda"
    assert isinstance(parts.engine, OverlappedEngine)


def test_a_pool_that_does_not_fit_is_refused_with_what_would(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv\.num_blocks: 100000000 blocks of .* GB of the GPU; lower it to \d+"):
        assembled(folder, **{"kv.num_blocks": 100_000_000})
    with pytest.raises(ConfigError, match=r"engine\.strict: no fast backend .*hopper: is switched off"):
        assembled(folder, **{"engine.disabled": ["hopper"]})


def test_the_pool_takes_its_share_of_what_the_largest_step_leaves(folder: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    made = assembled(folder, **{"kv.num_blocks": None, "kv.memory_fraction": 0.05})
    taken = sum(region.nbytes for regions in made.pool.regions for region in regions)
    assert 0.03 * free < taken < 0.07 * free
    for executor in made.executors:
        executor.stop()


def test_log_probabilities_agree_with_fp32_as_well_as_plain_bf16_does(folder: Path, parts: Assembly) -> None:
    """Of prompts, in chunks with cached context before them, and of what is generated after them, in graphs."""
    random, driven = Random(1), driver(parts)
    texts = [prompt(random, length) for length in (40, 129, 300, 500)]
    wanted = SamplingParams(max_tokens=40, ignore_eos=True, num_logprobs=0, num_prompt_logprobs=0)
    sequences = [driven.submit(text, wanted) for text in texts]
    driven.run()
    ours, rounded, exact, distinct = [], [], [], set[int]()
    for text, sequence in zip(texts, sequences, strict=True):
        emitted = driven.emitted(sequence)
        distinct.update(emitted)
        assert len(emitted) == 40
        of_prompt = driven.prompt_logprobs(sequence)
        of_drawn = [each.logprob for each in driven.logprobs(sequence) if each is not None]
        ours.append(torch.tensor([of_prompt[index].logprob for index in range(1, len(text))] + of_drawn))
        rounded.append(reference_logprobs(folder, text + emitted, torch.bfloat16))
        exact.append(reference_logprobs(folder, text + emitted, torch.float32))
    error = (torch.cat(ours) - torch.cat(exact)).abs().mean()
    of_bf16 = (torch.cat(rounded) - torch.cat(exact)).abs().mean()
    spread = torch.cat(exact).std()
    print(f"mean error {error:.4f}, plain bf16 {of_bf16:.4f}, spread {spread:.3f}, {len(distinct)} different tokens")
    assert error < 1.3 * of_bf16 + 0.01 * spread
    assert of_bf16 < 0.2 * spread and len(distinct) > 80


def test_the_same_seed_draws_the_same_tokens(parts: Assembly) -> None:
    random, driven = Random(2), driver(parts)
    text = prompt(random, 100)
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.9, top_p=0.95, top_k=50, seed=7)
    first, second = [], []
    for found in (first, second):
        sequence = driven.submit(text, params)
        driven.run()
        found += driven.emitted(sequence)
        parts.blocks.clear_cache()  # or a cached prefix changes what is computed together, and the rounding
    assert first == second and len(set(first)) > 10


class Reserved:
    """A reservation of a pull whose bytes are written at once, by another stream, as a read would."""

    def __init__(self, parts: Assembly, sequence: Sequence, mark: int, stream: torch.cuda.Stream) -> None:
        self.parts, self.sequence, self.mark = parts, sequence, mark
        reservation = parts.scheduler.reserve_for_pull(sequence)
        assert reservation is not None
        self.blocks = torch.tensor(reservation.destination[0], device=parts.pool.device)
        with torch.cuda.stream(stream):
            for region in parts.pool.regions[0]:
                region[self.blocks] = mark
        stream.synchronize()

    def is_intact(self) -> bool:
        return all(bool((region[self.blocks] == self.mark).all()) for region in self.parts.pool.regions[0])


def test_blocks_freed_in_flight_are_nobodys_destination_before_their_step_has_ended(folder: Path) -> None:
    """Stop, cancel and preemption while the next step, which the device has not begun, still writes their blocks."""
    parts = assembled(folder, **{"kv.num_blocks": 12, "kv.prefix_cache": False, "kv.prefill_reserve": 0.0})
    driven, random, stream = driver(parts), Random(3), torch.cuda.Stream()
    num_refused = 0
    for round_ in range(12):
        ended = driven.add(prompt(random, 5 * BLOCK_SIZE - 8), max_tokens=200)
        other = driven.add(prompt(random, 5 * BLOCK_SIZE - 8), max_tokens=200)
        while ended.num_emitted < 3 + round_ % 4:
            driven.step()
        torch.cuda._sleep(20_000_000)  # some 10 ms: what is launched from now on has not begun
        driven.step()
        parts.scheduler.abort(ended)
        waiting = driven.sequence(prompt(random, 6 * BLOCK_SIZE), SamplingParams(max_tokens=4))
        if parts.scheduler.reserve_for_pull(waiting) is None:
            num_refused += 1  # all that is free may still be written
        else:
            raise AssertionError("blocks of a step in flight were handed out")
        driven.step()
        reserved = Reserved(parts, waiting, 7 + round_, stream)
        for _ in range(4):
            driven.step()
        torch.cuda.synchronize()
        assert reserved.is_intact()
        for sequence in (waiting, other):
            parts.scheduler.abort(sequence)
        driven.run()
        parts.scheduler.check_integrity()
    assert num_refused == 12
    assert parts.blocks.counts(0).free == 12
    for executor in parts.executors:
        executor.stop()


def test_what_a_chunk_wrote_is_there_when_it_is_told(parts: Assembly) -> None:
    """Also of a step that draws nothing: a ticket leaves then, and another process reads."""
    driven, stream = driver(parts), torch.cuda.Stream()
    sequence = driven.add(prompt(Random(8), 6 * BLOCK_SIZE), max_tokens=1)
    seen: list[torch.Tensor] = []
    (regions,) = parts.pool.regions
    for region in regions:
        region.zero_()
    while driven.engine.has_work:
        torch.cuda._sleep(20_000_000)  # some 10 ms before each step begins
        outcome = driven.step()
        if outcome is not None and outcome.chunks:
            with torch.cuda.stream(stream):
                seen.append(regions[0].any(dim=1).any(dim=1).sum())
            stream.synchronize()
    assert sequence.is_finished
    counts = [int(each) for each in seen]
    assert len(counts) == 3 and counts[0] >= 2 and counts[1] >= 4 and counts[2] >= 6
    parts.blocks.clear_cache()
