"""The step with the next one prepared while it runs: the same tokens, and errors stay where they belong."""

from __future__ import annotations

from cluster.request import SamplingParams
from tests.support.engines import BLOCK_SIZE, TinyEngine, limits
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


def handed_out(tiny: TinyEngine) -> int:
    """How many blocks a pull could have now."""
    return max(count for count in range(9) if tiny.blocks.can_reserve([count], for_transfer=True))


def test_blocks_of_a_step_in_flight_are_nobodys_destination() -> None:
    """Stopped while the next step is in flight, cancelled while one is: what they held is handed to a pull only when
    no step may write it any more, and no token comes after all."""
    tiny = TinyEngine(num_blocks=8, scheduler_limits=limits(max_sequences=4))
    engine = overlapped(tiny)

    def step() -> None:
        outcome = engine.step()
        assert outcome is not None
        tiny.outcomes.append(outcome)

    tokens = tiny.model.greedy([5, 6, 7], 20)
    stop = next(token for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    stopped = tiny.add([5, 6, 7], max_tokens=20, stop_token_ids=(stop,))
    while not stopped.is_finished:
        step()
    assert engine.has_work, "its next token is being computed"
    num_blocks = -(-len(stopped.tokens) // BLOCK_SIZE)
    assert handed_out(tiny) == 8 - num_blocks < 8
    assert tiny.blocks.can_reserve([8]), "computing goes on behind the step, and may have them"
    cancelled = tiny.add(list(range(20, 39)), max_tokens=10)
    step()
    assert tiny.blocks.counts(0).filling == 5 == 8 - handed_out(tiny)
    while cancelled.num_emitted < 2:
        step()
    tiny.scheduler.abort(cancelled)
    assert handed_out(tiny) == 2, "6 of it"
    pulling = tiny.sequence(list(range(40, 55)), SamplingParams(max_tokens=2))
    assert tiny.scheduler.reserve_for_pull(pulling) is None
    engine.step()
    assert tiny.scheduler.reserve_for_pull(pulling) is not None
    tiny.scheduler.abort(pulling)
    run(tiny, engine)
    assert tiny.emitted(cancelled) == tiny.model.greedy(list(range(20, 39)), 2)
    assert tiny.emitted(stopped) == tokens[: tokens.index(stop) + 1]


def test_a_chunk_is_told_when_its_step_has_ended_and_not_when_it_was_launched() -> None:
    """A ticket follows what is told: nobody may read blocks that are still being written."""
    tiny = TinyEngine(scheduler_limits=limits(chunk_tokens=8, max_sequences=4))
    engine = overlapped(tiny)
    seq = tiny.add(list(range(1, 31)), max_tokens=1)
    told: list[int] = []
    launched: list[tuple[int, int]] = []
    while engine.has_work:
        outcome = engine.step()
        if outcome is None:
            continue
        told += [chunk.num_confirmed for chunk in outcome.chunks]
        launched.append((seq.num_computed, len(told)))
    assert told == [8, 16, 24, 30]
    assert launched[:4] == [(8, 0), (16, 1), (24, 2), (30, 3)]
