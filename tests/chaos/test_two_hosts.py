"""Two hosts, plain TCP between them, and a cable that is pulled out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.chaos import GREEDY, Chaos, assert_greedy, prompts, running_chaos
from tests.support.hosts import Host, hosts, serve_on
from tests.support.plain_cluster import Answer

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.netns, pytest.mark.timeout(180)]

NAMES = ("prefill-0", "prefill-1", "prefill-2", "decode-0", "decode-1")
ALONE = {"prefill-0", "decode-1"}
TEXTS = prompts(6, 300, 400, seed=7)
LONG = replace(GREEDY, max_tokens=96)
SETTINGS = {
    "transfer.ucx_tls": "tcp,self",
    "words.heartbeat_s": 0.2,
    "words.heartbeat_timeout_s": 1.2,
}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Chaos, Host]]:
    """prefill-0 and decode-1 on one host, which may be cut off. Three sources and two sinks, each taken in turn: six
    requests go all ways."""
    with hosts(2) as (lonely, other):
        places = {name: lonely if name in ALONE else other for name in NAMES}
        with running_chaos(SETTINGS, prefill=3, decode=2, main=serve_on(places)) as chaos:
            yield chaos, lonely


def test_a_request_is_served_across_hosts(pair: tuple[Chaos, Host]) -> None:
    chaos, _ = pair
    answers = chaos.runner.run(chaos.together(TEXTS))
    for text, answer in zip(TEXTS, answers, strict=True):
        assert_greedy(text, answer)
        assert answer.route.transport == "nixl" and answer.route.blocks > 0
    ways = {(answer.route.prefill.name, answer.route.decode.name) for answer in answers}
    assert len(ways) == 6
    crossing = [(source, sink) for source, sink in ways if (source in ALONE) != (sink in ALONE)]
    assert len(crossing) == 3
    chaos.runner.run(chaos.cluster.assert_all_free())


def test_a_cut_host_is_noticed_and_its_requests_go_on_at_the_other(pair: tuple[Chaos, Host]) -> None:
    chaos, lonely = pair

    async def scene() -> list[Answer]:
        chaos.freeze("prefill-0")  # so that both sinks wait for it when the cable goes
        asked = chaos.ask(TEXTS, LONG)
        for sink in ("decode-0", "decode-1"):
            await chaos.watch.until(sink, lambda load: load.num_pulling > 0, "asked")
        lonely.unplug()
        chaos.thaw("prefill-0")
        answers = await asyncio.gather(*asked)
        lonely.plug()
        return answers

    replays = chaos.cluster.metrics.value("sluice_ingress_replays_total")
    answers = chaos.runner.run(scene())
    for text, answer in zip(TEXTS, answers, strict=True):
        assert_greedy(text, answer, LONG.max_tokens)
    assert all(answer.route.decode.name == "decode-0" for answer in answers)
    assert all(answer.route.prefill.name not in ALONE for answer in answers if answer.attempt > 1)
    assert any(answer.route.spare_used for answer in answers), "nobody was reading across the cable"
    assert chaos.cluster.metrics.value("sluice_ingress_replays_total") > replays
    chaos.runner.run(chaos.cluster.until_warm())  # the cable is in again: the same processes serve
    chaos.runner.run(chaos.cluster.assert_all_free())
    again = chaos.runner.run(chaos.together(TEXTS))
    for text, answer in zip(TEXTS, again, strict=True):
        assert_greedy(text, answer)
    assert {answer.route.decode.name for answer in again} == {"decode-0", "decode-1"}
