"""The step with the next one prepared while it runs: the same tokens, and errors stay where they belong."""

from __future__ import annotations

from tests.support.engines import TinyEngine, limits
from tests.workers.engine.test_engine import prompts
from workers.engine.overlap import OverlappedEngine


def overlapped(tiny: TinyEngine) -> OverlappedEngine:
    return OverlappedEngine(tiny.scheduler, tiny.runner)


def run(tiny: TinyEngine, engine: OverlappedEngine) -> None:
    while engine.has_work:
        outcome = engine.step()
        if outcome is not None:
            tiny.outcomes.append(outcome)
    tiny.scheduler.check_integrity()


def test_overlapped_steps_draw_the_same_tokens() -> None:
    """Few blocks: sequences are preempted while a step that they are in is in flight."""
    tiny = TinyEngine(num_blocks=24, scheduler_limits=limits(max_batched_tokens=20, max_sequences=8, chunk_tokens=8))
    given_ = prompts(7, shortest=3, longest=30)
    sequences = [tiny.add(prompt, max_tokens=4 + 3 * i) for i, prompt in enumerate(given_)]
    run(tiny, overlapped(tiny))
    assert sum(seq.num_preemptions for seq in sequences) > 0
    for i, (prompt, seq) in enumerate(zip(given_, sequences, strict=True)):
        assert tiny.emitted(seq) == tiny.model.greedy(prompt, 4 + 3 * i)


def test_a_stop_that_is_seen_late_lets_no_token_out() -> None:
    tiny = TinyEngine()
    tokens = tiny.model.greedy([5, 6, 7], 20)
    stop = next(token for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    seq = tiny.add([5, 6, 7], max_tokens=20, stop_token_ids=(stop,))
    neighbour = tiny.add([1, 2], max_tokens=20)
    engine = overlapped(tiny)
    run(tiny, engine)
    assert tiny.emitted(seq) == tokens[: tokens.index(stop) + 1]
    assert tiny.emitted(neighbour) == tiny.model.greedy([1, 2], 20)
    assert engine.num_steps >= 20


def test_a_raising_step_ends_its_sequences_and_nothing_else() -> None:
    tiny = TinyEngine(scheduler_limits=limits(max_sequences=2))
    tiny.model.poison = 96
    well = tiny.add([1, 2, 3], max_tokens=6)
    engine = overlapped(tiny)
    engine.step()
    engine.step()
    poisoned = tiny.add([7, 8, 9, 96], max_tokens=6)
    later = tiny.add([4, 5], max_tokens=6)
    run(tiny, engine)
    failed = [seq for outcome in tiny.outcomes for seq in outcome.failed]
    assert poisoned in failed and later not in failed
    assert engine.num_failed_steps == 1 and engine.num_failed_in_a_row == 0
    assert tiny.emitted(later) == tiny.model.greedy([4, 5], 6)
    assert well in failed, "it had a row in the step that raised"
