"""Workers that die of one request while others are on them: only that one is refused."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import WorkerFailed
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from router.flight import MAX_DEATHS, PROVEN_TOKENS, Flight, State
from router.trial import Trial, blamed
from tests.router.test_flight import MAX_ATTEMPTS, flight, lost, plan_on, tokens
from tests.support.routing import Stage, desk, gather, play, wait_for
from tests.support.scripted_worker import FOREVER, Action, Attempt, Die, Fail, Say, ScriptedWorker, Wait, all_tokens

POISON = 666
NUM_BYSTANDERS = 3


class Deadly:
    """The worker dies of a prompt that begins with POISON; the others say two tokens and wait for it."""

    def __init__(self, *after: Action) -> None:
        self.after = after

    def __call__(self, attempt: Attempt) -> bool:
        if attempt.submit.prompt_token_ids[0] == POISON:
            return Die()(attempt)
        for act in self.after:
            act(attempt)
        return True


def run(words: WordsThread, workers: list[ScriptedWorker]) -> None:
    """Bystanders, and the poison when they have begun: it alone is refused."""

    async def scene() -> None:
        async with desk(words, local_prefill="always", policy="least_loaded") as at:
            await at.connect(*workers)
            prompts = [(i + 1, 7, 7, 7) for i in range(NUM_BYSTANDERS)]
            tasks = [
                asyncio.ensure_future(gather(at.router, at.request(prompt_token_ids=p, max_tokens=40))) for p in prompts
            ]
            await wait_for(workers[0], lambda worker: len(worker.submits) == NUM_BYSTANDERS)
            poison = at.request(prompt_token_ids=(POISON, 7, 7, 7))
            with pytest.raises(WorkerFailed, match=poison.request_id):
                await gather(at.router, poison)
            for prompt, (ids, _) in zip(prompts, await asyncio.gather(*tasks), strict=True):
                assert ids == all_tokens(prompt, 40)

    play(scene)


def test_of_those_that_lost_two_workers_together_only_the_guilty_one_is_refused(
    words: WordsThread, stage: Stage
) -> None:
    """Each is tried alone: the third worker that dies is the last."""
    workers = [stage.decode(f"decode-{i}", Deadly(Say(2), Wait())) for i in range(2)]
    workers += [stage.decode(f"decode-{i}", Deadly(FOREVER)) for i in range(2, 4)]
    for index, worker in enumerate(workers):
        worker.load.num_running = 10 * index  # they are chosen in turn
    run(words, workers)
    assert sum(worker._stopped for worker in workers) == MAX_DEATHS + 1


def test_of_those_whose_step_raised_twice_only_the_guilty_one_is_refused(words: WordsThread, stage: Stage) -> None:
    """The workers live, and those that were turned away together may come back."""

    class Step:
        """Fails all that are open when the poison is among them, in one frame."""

        def __init__(self) -> None:
            self.open: list[Attempt] = []

        def __call__(self, attempt: Attempt) -> bool:
            self.open.append(attempt)
            poisoned = attempt.submit.prompt_token_ids[0] == POISON
            if poisoned:
                failure = pb.Failure(code=pb.INTERNAL, message="step 1 failed")
                failed = [
                    pb.SequenceTokens(
                        key=each.submit.key, first_token_index=each.index, finish=pb.ERROR, failure=failure
                    )
                    for each in self.open
                ]
                self.open.clear()
                attempt.session.send(pb.Frame(step_tokens=pb.StepTokens(sequences=failed)))
            elif attempt.submit.key.attempt > MAX_DEATHS:
                self.open.remove(attempt)
                return FOREVER(attempt)
            return False

    workers = [stage.decode(f"decode-{i}", Step()) for i in range(2)]
    workers[1].load.num_running = 10
    run(words, workers)


def test_one_that_went_on_well_past_a_death_did_not_cause_it() -> None:
    one = flight(max_tokens=1000)
    for index in range(20):  # a worker a second, for all it knows
        one.place(plan_on(str(index)), f"s{index}")
        first = len(one.emitted)
        one.receive(f"s{index}", tokens(one.attempt, first, [5] * PROVEN_TOKENS))
        assert one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False)
        assert not one.is_suspected
    one.place(plan_on("x"), "x")
    one.receive("x", tokens(one.attempt, len(one.emitted), [5] * (PROVEN_TOKENS - 1)))
    assert one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False)
    assert one.is_suspected


def tried(*, in_company: bool = True) -> Flight:
    """Two workers were lost under it."""
    one = flight()
    for name in "ab":
        one.place(plan_on(name), name)
        assert one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False, in_company=in_company)
    assert one.is_suspected
    return one


def test_one_is_on_trial_at_a_time_and_nobody_else_is_blamed_meanwhile() -> None:
    trial, first, second = Trial(), tried(), tried()
    assert trial.take(first) and not trial.take(second)
    assert list(blamed([second, first])) == [first]
    assert list(blamed([second])) == [second]
    first.place(plan_on("c"), "c")
    first.fail_attempt(lost(), MAX_ATTEMPTS, reported=False)
    assert first.is_convicted
    first.end(first.poisonous())
    assert first.state is State.ENDED and trial.take(second)
    second.place(plan_on("c"), "c")
    second.fail_attempt(lost(), MAX_ATTEMPTS, reported=False, blamed=False)
    assert not second.is_convicted


def test_sessions_that_break_although_their_workers_live_use_up_no_attempts() -> None:
    """As when an ingress wakes up: all its sessions break, one after the other, and some once more."""
    one = flight()
    for name in "ab":
        one.place(plan_on(name), name)
        assert one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False)
    for name in "ab":
        one.heard_of(plan_on(name).decode.incarnation)
    assert not one.is_suspected
    for _ in range(MAX_ATTEMPTS - 1):
        one.place(plan_on("a"), "a")
        assert one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False)
        one.heard_of(plan_on("a").decode.incarnation)
    one.place(plan_on("a"), "a")
    assert not one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False), (
        "once for each worker, or it would go on for ever"
    )
    assert one.state is State.ENDED and isinstance(one.error, WorkerFailed)


@pytest.mark.parametrize("code", [pb.PEER_LOST, pb.INTERNAL])
def test_alone_twice_is_enough(words: WordsThread, stage: Stage, code: pb.ErrorCode) -> None:
    death = Die() if code == pb.PEER_LOST else Fail(code)
    workers = [stage.decode(f"decode-{i}", death) for i in range(3)]

    async def scene() -> None:
        async with desk(words, local_prefill="always") as at:
            await at.connect(*workers)
            with pytest.raises(WorkerFailed, match="failed on 2 workers"):
                await gather(at.router, at.request())

    play(scene)
    assert sum(len(worker.submits) for worker in workers) == 2
