"""Workers that leave, or change their role, under load: what they hold is finished, handed over, and whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.autoscaler import WorkerLoad
from cluster.config import Role
from cluster.membership import MemberState
from tests.support import telling_worker
from tests.support.chaos import FAMILY, GREEDY, Chaos, assert_greedy, prompts, running_chaos
from tests.support.checkpoints import checkpoint
from tests.support.revision import another_revision

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(120)]

TEXTS = prompts(6, 60, 160, seed=5)
LONG = replace(GREEDY, max_tokens=160)


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    """Streams go elsewhere at once."""
    settings = {"scheduler.handover_s": 0, "router.local_prefill": "never", "router.worker_wait_s": 100}
    with running_chaos(settings, prefill=2, decode=2, main=telling_worker.serve) as chaos:
        yield chaos


def change(chaos: Chaos, *names: str, state: MemberState = MemberState.READY, roles: tuple[Role, ...] = ()) -> None:
    """What the controller says of these workers, to everybody and at once."""
    for name in names:
        member = chaos.member(name)
        chaos.cluster.workers[name].member = replace(member, state=state, roles=roles or member.roles)
    chaos.cluster.publish()


async def gone(chaos: Chaos, name: str) -> None:
    """It holds nothing: no request, no lease; then its process ends and a new one takes its name."""
    await chaos.watch.until(
        name,
        lambda load: load.draining and not load.num_leases + load.num_running + load.num_pulling + load.num_waiting,
        "it holds nothing",
    )
    await chaos.cluster.kill(name)
    await chaos.cluster.replace(name)


def test_workers_tell_what_the_autoscaler_asks(chaos: Chaos) -> None:
    def told() -> dict[str, WorkerLoad]:
        """Since the last time."""
        for worker in chaos.cluster.workers.values():
            while worker.pipe.poll():
                worker.pipe.recv()
        chaos.cluster.publish()
        return {name: worker.pipe.recv() for name, worker in chaos.cluster.workers.items()}

    async def busy() -> dict[str, WorkerLoad]:
        tasks = chaos.ask(TEXTS, LONG)
        await chaos.watch.until("decode-0", lambda load: load.num_running >= 2, "streaming")
        loads = await asyncio.to_thread(told)
        await asyncio.gather(*tasks)
        return loads

    told()
    loads = chaos.runner.run(busy())
    assert {name: set(load.roles) for name, load in loads.items()} == {
        name: {Role(name.partition("-")[0])} for name in loads
    }
    assert all(0 < loads[f"prefill-{i}"].busy <= 1 for i in (0, 1))
    assert any(loads[f"prefill-{i}"].queue_s > 0 for i in (0, 1))
    assert loads["decode-0"].occupancy >= 2 / 16  # scheduler.max_sequences
    assert loads["decode-0"].inter_token_s > 0
    told()
    idle = told()
    assert all((load.busy, load.backlog_s, load.occupancy) == (0, 0, 0) for load in idle.values()), idle


@pytest.mark.parametrize("pool", ["decode", "prefill"])
def test_a_pool_shrinks_under_load_and_every_request_is_whole(chaos: Chaos, pool: str) -> None:
    name = f"{pool}-0"
    replays = chaos.cluster.metrics.value("sluice_ingress_replays_total")
    handovers = chaos.runner.run(chaos.cluster.total("sluice_engine_handovers_total"))

    async def shrink() -> int:
        tasks = chaos.ask(TEXTS, LONG)
        await chaos.watch.until("decode-0", lambda load: load.num_running >= 1, "streaming")
        change(chaos, name, state=MemberState.DRAINING)
        later = chaos.ask(TEXTS[:3])
        for text, answer in zip(TEXTS, await asyncio.gather(*tasks), strict=True):
            assert_greedy(text, answer, LONG.max_tokens)
        for text, answer in zip(TEXTS, await asyncio.gather(*later), strict=False):
            assert_greedy(text, answer)
            assert name not in (answer.route.decode.name, answer.route.prefill.name)
        num_handed = int(await chaos.cluster.total("sluice_engine_handovers_total") - handovers)
        await gone(chaos, name)
        return num_handed

    num_handed = chaos.runner.run(shrink())
    assert (num_handed > 0) == (pool == "decode")
    assert chaos.cluster.metrics.value("sluice_ingress_replays_total") - replays <= num_handed
    chaos.runner.run(chaos.cluster.assert_all_free())


def test_the_last_worker_that_can_serve_a_stream_keeps_it(chaos: Chaos) -> None:
    """Both decode workers are to leave: neither has anybody to hand over to."""

    async def both() -> None:
        tasks = chaos.ask(TEXTS[:2], LONG)
        await chaos.watch.until("decode-0", lambda load: load.num_running >= 1, "streaming")
        change(chaos, "decode-0", "decode-1", state=MemberState.DRAINING)
        waiting = chaos.ask(TEXTS[2:3])  # for the successor of one of them
        for text, answer in zip(TEXTS, await asyncio.gather(*tasks), strict=False):
            assert_greedy(text, answer, LONG.max_tokens)
        await gone(chaos, "decode-1")
        assert_greedy(TEXTS[2], await waiting[0])
        await gone(chaos, "decode-0")

    chaos.runner.run(both())
    chaos.runner.run(chaos.cluster.assert_all_free())


def test_a_worker_changes_its_role_and_back_without_a_restart(chaos: Chaos) -> None:
    before = [chaos.member(name).incarnation for name in chaos.cluster.workers]

    async def switch() -> None:
        tasks = chaos.ask(TEXTS, LONG)
        await chaos.watch.until("decode-1", lambda load: load.num_running >= 1, "streaming")
        change(chaos, "decode-1", roles=(Role.PREFILL,))
        change(chaos, "prefill-0", "prefill-1", state=MemberState.DRAINING)  # decode-1 is the one source
        answers = await asyncio.gather(*tasks)
        for text, answer in zip(TEXTS, answers, strict=True):
            assert_greedy(text, answer, LONG.max_tokens)
        assert any(answer.attempt > 1 for answer in answers)  # handed over
        await chaos.watch.until(
            "decode-0",
            lambda load: chaos.member("decode-1").incarnation in {p.source_incarnation for p in load.pairs if p.warm},
            "decode-0 can read from decode-1",
        )
        computed = await chaos.together(TEXTS[3:5])
        for text, answer in zip(TEXTS[3:], computed, strict=False):
            assert_greedy(text, answer)
            assert (answer.route.prefill.name, answer.route.decode.name) == ("decode-1", "decode-0")
        change(chaos, "decode-1", roles=(Role.DECODE,))
        change(chaos, "decode-0", roles=(Role.PREFILL,))
        await chaos.watch.until(
            "decode-1",
            lambda load: chaos.member("decode-0").incarnation in {p.source_incarnation for p in load.pairs if p.warm},
            "decode-1 can read from decode-0",
        )
        [answer] = await chaos.together(TEXTS[5:])
        assert_greedy(TEXTS[5], answer)
        assert (answer.route.prefill.name, answer.route.decode.name) == ("decode-0", "decode-1")

    chaos.runner.run(switch())
    assert [chaos.member(name).incarnation for name in chaos.cluster.workers] == before
    chaos.runner.run(chaos.cluster.assert_all_free())


@pytest.mark.full
def test_workers_of_two_hashes_serve_side_by_side_and_the_old_ones_leave_without_a_loss(tmp_path: Path) -> None:
    with running_chaos({"scheduler.handover_s": 0, "router.local_prefill": "never"}) as chaos:
        cluster = chaos.cluster

        async def roll() -> None:
            tasks = chaos.ask(TEXTS, LONG)
            await chaos.watch.until("decode-0", lambda load: load.num_running >= 1, "streaming")
            model = cluster.config.model.model_copy(update={"path": another_revision(checkpoint(FAMILY), tmp_path)})
            cluster.config = cluster.config.model_copy(update={"model": model})
            await asyncio.gather(*(cluster.start_worker(pool, f"{pool}-1") for pool in ("prefill", "decode")))
            hashes = [chaos.member(f"{pool}-{i}").compatibility_hash for i in (0, 1) for pool in ("prefill", "decode")]
            assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
            cluster.publish()
            await chaos.watch.until("decode-1", lambda load: any(pair.warm for pair in load.pairs), "warm")
            tasks += chaos.ask(TEXTS[:4], LONG)
            for pool in ("prefill", "decode"):
                change(chaos, f"{pool}-0", state=MemberState.DRAINING)
            tasks += chaos.ask(TEXTS[:2], LONG)
            answers = await asyncio.gather(*tasks)
            for text, answer in zip((*TEXTS, *TEXTS[:4], *TEXTS[:2]), answers, strict=True):
                assert_greedy(text, answer, LONG.max_tokens)
                assert answer.route.prefill.name[-1] == answer.route.decode.name[-1], "pairs of one hash only"
            assert {answer.route.decode.name for answer in answers} == {"decode-0", "decode-1"}
            assert {answer.route.decode.name for answer in answers[-2:]} == {"decode-1"}
            for pool in ("prefill", "decode"):
                await chaos.watch.until(f"{pool}-0", lambda load: not load.num_leases + load.num_running, "empty")
                await cluster.kill(f"{pool}-0")
            cluster.publish()

        chaos.runner.run(roll())
        chaos.runner.run(cluster.assert_all_free())
