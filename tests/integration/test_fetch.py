"""A worker that computes a prompt fetches its first blocks from another one's cache, or computes them: the tokens are
the same, whatever becomes of the holder."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from cluster.metrics import FetchOutcome
from cluster.protos import worker_pb2 as pb
from cluster.request import SamplingParams
from tests.support.chaos import BLOCK_SIZE, Chaos, assert_greedy, is_greedy, prompts, running_chaos
from tests.support.raw_ingress import RawIngress

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

NUM_BLOCKS = 48  # of each worker: three of the prompts below, with their answers
SETTINGS = {
    "router.policy": "kv_aware",
    "kv.num_blocks": NUM_BLOCKS,
    "words.heartbeat_timeout_s": 20.0,
    "words.step_timeout_s": 20.0,  # a busy machine is no failure here
}
TEXTS = prompts(8, 196, 204, seed=11)
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
WHOLE = 196 // BLOCK_SIZE  # blocks that each text fills at least
FETCHES = "sluice_transfer_fetches_total"


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    with running_chaos(SETTINGS, prefill=2, decode=2) as chaos:
        chaos.runner.run(until_paired(chaos))
        yield chaos


async def until_paired(chaos: Chaos) -> None:
    """Every worker can read from every other one, and the router knows."""
    workers = {chaos.member(name).incarnation for name in chaos.cluster.workers}

    def paired() -> bool:
        seen = {each.incarnation: {each.incarnation, *each.warm_sources} for each in fleet.candidates()}
        return seen == dict.fromkeys(workers, workers)

    fleet = chaos.cluster.router._fleet
    await chaos.cluster.until(paired, "every pair is warm")


async def fetches(chaos: Chaos, worker: str = "") -> Counter[FetchOutcome]:
    """By outcome, of one worker or of all."""
    counters = {name: values for name, values in (await chaos.cluster.counters()).items() if name.startswith(worker)}
    return Counter(
        {
            outcome: sum(int(values[f"{FETCHES}|outcome={outcome}"]) for values in counters.values())
            for outcome in FetchOutcome
        }
    )


class Asker:
    """Asks with plans of its own making, and checks every answer."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.ingress = RawIngress(chaos.cluster.words, BLOCK_SIZE)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.ingress.stop()

    async def begin(
        self, text: tuple[int, ...], prefill: str, decode: str, held_by: str = "", num_blocks: int = WHOLE
    ) -> str:
        member = self.chaos.member
        holding = (member(held_by), num_blocks) if held_by else None
        return await self.ingress.submit(member(decode), member(prefill), text, SHORT, holding=holding)

    async def end(self, text: tuple[int, ...], request_id: str) -> pb.Route:
        last = await self.ingress.end_of(request_id)
        tokens = tuple(self.ingress.token_ids[request_id])
        assert last.finish == pb.LENGTH and len(tokens) == SHORT.max_tokens, last
        assert is_greedy(text, tokens)
        return last.route

    async def ask(
        self, text: tuple[int, ...], prefill: str, decode: str, held_by: str = "", num_blocks: int = WHOLE
    ) -> pb.Route:
        return await self.end(text, await self.begin(text, prefill, decode, held_by, num_blocks))


def test_what_is_fetched_and_what_is_computed_instead(chaos: Chaos) -> None:
    text, other, *_ = TEXTS
    wanted = (len(text) - 1) // BLOCK_SIZE

    async def scene(asker: Asker) -> None:
        await asker.ask(text, "prefill-0", "decode-0")
        before = await fetches(chaos)
        lent = await chaos.cluster.total("sluice_transfer_lent_blocks_total", "decode-0")
        computed = await chaos.cluster.total("sluice_engine_computed_tokens_total", "prefill-1")

        # Whole, from a decode worker, for another one: only what the holder lacks is computed.
        route = await asker.ask(text, "prefill-1", "decode-1", "decode-0", wanted)
        assert (route.fetched.holder.name, route.fetched.blocks) == ("decode-0", wanted)
        assert route.prefill.name == "prefill-1" and route.prefill_prefix_hit_tokens == 0
        assert route.blocks == -(-len(text) // BLOCK_SIZE)  # those that prefill-1 fetched included
        assert route.fetched.bytes == route.bytes // route.blocks * wanted and route.fetched.seconds > 0
        assert route.skipped_blocks == wanted and route.fetched.tokens == wanted * BLOCK_SIZE
        assert route.prefill_s > 0 and route.queue_s >= 0
        computed = await chaos.cluster.total("sluice_engine_computed_tokens_total", "prefill-1") - computed
        assert computed == len(text) - wanted * BLOCK_SIZE
        assert await chaos.cluster.total("sluice_transfer_fetched_tokens_total") == wanted * BLOCK_SIZE
        lent = await chaos.cluster.total("sluice_transfer_lent_blocks_total", "decode-0") - lent
        assert lent == wanted

        # Now it has them itself.
        route = await asker.ask(text, "prefill-1", "decode-0", "decode-1", wanted)
        assert not route.HasField("fetched") and route.prefill_prefix_hit_tokens == wanted * BLOCK_SIZE
        assert route.skipped_blocks == wanted

        # A decode worker that computes the prompt itself, from a prefill worker; it has five blocks of it.
        await asker.ask(other[: 5 * BLOCK_SIZE + 1], "prefill-0", "decode-1")
        await asker.ask(other, "prefill-1", "decode-0")
        route = await asker.ask(other, "decode-1", "decode-1", "prefill-1")
        assert route.local_prefill and route.decode_prefix_hit_tokens == 5 * BLOCK_SIZE
        assert (route.fetched.holder.name, route.fetched.blocks) == ("prefill-1", WHOLE - 5)
        assert route.skipped_blocks == WHOLE and route.prefill_s > 0 and route.queue_s >= 0

        # The holder has less than was said: five blocks of them. Then nothing at all.
        await chaos.cluster.router.clear_cache()
        await asker.ask(other[: 5 * BLOCK_SIZE + 1], "prefill-0", "decode-0")
        route = await asker.ask(other, "prefill-1", "decode-1", "prefill-0")
        assert route.fetched.blocks == 5 and route.prefill_prefix_hit_tokens == 0
        await chaos.cluster.router.clear_cache()
        route = await asker.ask(other, "prefill-1", "decode-1", "prefill-0")
        assert route.fetched.holder.name == "prefill-0" and route.fetched.blocks == 0
        await chaos.cluster.router.clear_cache()
        route = await asker.ask(other, "prefill-1", "decode-1", "prefill-1")  # nobody is paired with itself
        assert not route.HasField("fetched")

        expected = {
            FetchOutcome.OK: 2,
            FetchOutcome.UNNEEDED: 1,
            FetchOutcome.PARTIAL: 1,
            FetchOutcome.REFUSED: 1,
            FetchOutcome.NO_PAIR: 1,
        }
        assert await fetches(chaos) - before == expected
        await chaos.cluster.assert_all_free()

    with Asker(chaos) as asker:
        chaos.runner.run(scene(asker))


def test_two_that_fetch_from_each_other_never_wait_for_each_other(chaos: Chaos) -> None:
    """Their pools hold three prompts; eight each are asked for at once, fetched crosswise."""
    half = len(TEXTS) // 2
    homes = [("prefill-0", TEXTS[:half]), ("prefill-1", TEXTS[half:])]

    async def scene(asker: Asker) -> None:
        before = await fetches(chaos)
        for _ in range(2):
            for name, texts in homes:
                for text in texts[:2]:
                    await asker.ask(text, name, "decode-0")
            crosswise = [
                (text, other, name)
                for (name, texts), (other, _) in zip(homes, reversed(homes), strict=True)
                for text in (*texts, *texts[:2])
            ]
            Random(5).shuffle(crosswise)
            begun = [
                (text, await asker.begin(text, prefill, decode, holder))
                for (text, prefill, holder), decode in zip(crosswise, ("decode-0", "decode-1") * 6, strict=True)
            ]
            await asyncio.gather(*(asker.end(text, request_id) for text, request_id in begun))
        after = await fetches(chaos) - before
        assert after.total() == 2 * 12, after
        assert after[FetchOutcome.OK] + after[FetchOutcome.PARTIAL] > 0, after  # how many, eviction decides
        await chaos.cluster.assert_all_free()

    with Asker(chaos) as asker:
        chaos.runner.run(scene(asker))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_holder_that_is_killed_costs_a_recompute(chaos: Chaos, frozen: bool) -> None:
    """Before it answers, or while its answers and bytes are under way."""
    holder, texts = "prefill-0", TEXTS[:3]

    async def scene(asker: Asker) -> None:
        await chaos.cluster.router.clear_cache()
        before = await fetches(chaos, "prefill-1")
        for text in texts:
            await asker.ask(text, holder, "decode-0")
        if frozen:
            chaos.freeze(holder)
        begun = [(text, await asker.begin(text, "prefill-1", "decode-1", holder)) for text in texts * 2]
        if frozen:
            await chaos.watch.until("prefill-1", lambda load: load.num_pulling > 0, "it fetches")
        else:
            while not (await fetches(chaos, "prefill-1") - before).total():
                await asyncio.sleep(0)
        await chaos.cluster.kill(holder)
        routes = await asyncio.gather(*(asker.end(text, request_id) for text, request_id in begun))
        assert all(route.prefill.name == "prefill-1" for route in routes)
        if frozen:
            assert sum(route.fetched.blocks for route in routes) == 0
        assert (await fetches(chaos, "prefill-1") - before).total() == len(begun)
        await chaos.cluster.start_worker("prefill", holder)
        chaos.cluster.publish()
        await until_paired(chaos)
        await chaos.cluster.assert_all_free()

    with Asker(chaos) as asker:
        chaos.runner.run(scene(asker))


def test_the_router_has_a_new_worker_fetch_the_conversation(chaos: Chaos) -> None:
    """Its prefill worker died, but the decode worker holds all of it: prompt and answer."""

    async def indexed(num_blocks: int) -> None:
        await chaos.cluster.until(
            lambda: chaos.cluster.metrics.value("sluice_router_indexed_blocks") == num_blocks, "it is indexed"
        )

    async def scene() -> None:
        cluster = chaos.cluster
        await cluster.router.clear_cache()
        await indexed(0)
        text = TEXTS[0][:90]
        first = await cluster.ask(list(text), SamplingParams(max_tokens=60, ignore_eos=True))
        held = (len(text) + 59) // BLOCK_SIZE  # the last token has no KV
        await indexed(held + len(text) // BLOCK_SIZE)
        for name in chaos.names("prefill"):  # one that has computed anything might be quick enough to compute
            await cluster.kill(name)
        await cluster.start_worker("prefill", "prefill-2")
        cluster.publish()
        await until_paired(chaos)
        await indexed(held)
        again = (*text, *first.token_ids, *TEXTS[1][:21])
        second = await cluster.ask(list(again), SHORT, "second-turn")
        assert_greedy(again, second, SHORT.max_tokens)
        home = first.route.decode.name
        fetched = second.route.fetched
        assert (fetched.holder.name, fetched.blocks) == (home, held)
        told = cluster.router.route("second-turn")
        assert told is not None and told.outcome is not None
        assert (told.attempts[0].fetches_from, told.attempts[0].held_blocks) == (home, held)
        outcome = told.outcome
        assert (outcome.fetched_from, outcome.fetched_blocks, outcome.skipped_blocks) == (home, held, held)
        assert outcome.fetched_bytes == fetched.bytes and outcome.fetch_ms > 0 and outcome.prefill_ms > 0
        computed = await cluster.total("sluice_engine_computed_tokens_total", "prefill-2")
        assert computed == len(again) - held * BLOCK_SIZE
        await cluster.assert_all_free()

    chaos.runner.run(scene())
