"""An app in Ray Serve under load through its public port, whose controller is killed at random moments."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from random import Random

import httpx
import psutil
from ray.exceptions import RayError

from cluster.config_file import parse
from cluster.controller import Status
from cluster.request import SamplingParams
from deploy import life
from tests.chaos.answers import FAMILY, answered
from tests.chaos.arena import is_held, rest_of
from tests.chaos.campaign import Campaign, commit, write_expected
from tests.chaos.judge import CONTROLLER
from tests.chaos.questions import Question
from tests.chaos.record import Asked, Death, End, Ended, Fault, Got, Healed, Report, Run
from tests.chaos.what import STATES, State
from tests.support.checkpoints import checkpoint
from tests.support.serve_app import ServedApp, served_app

APP = "chaos"
INGRESS = "served"
REST_S, FIND_S, SUCCESSOR_S = 60.0, 10.0, 60.0


class Served:
    """Clients, one killer, and the report."""

    def __init__(self, app: ServedApp, campaign: Campaign, report: Report, asked: list[Question]) -> None:
        self._app = app
        self._campaign = campaign
        self._report = report
        self._asked = asked
        self._random = Random(campaign.seed)
        self._began_at = time.monotonic()
        self._ids = count(1)
        self._num_open = 0
        self._asking = asyncio.Event()
        self._over = False

    def now(self) -> float:
        return time.monotonic() - self._began_at

    async def run(self, say: Callable[[str], None]) -> None:
        clients = [asyncio.ensure_future(self._client()) for _ in range(self._campaign.num_clients)]
        ends_at = time.monotonic() + 60 * self._campaign.minutes
        members = {member.name: member.pid for member in self._app.members()}
        for number in range(1, self._campaign.num_faults + 1):
            if time.monotonic() > ends_at:
                break
            state = STATES[number % len(STATES)]
            took_s = await self._kill(number, state)
            say(f"{number:4} {CONTROLLER} · {state}: {took_s:.1f} s")
            for member in self._app.members():
                if members.get(member.name) != member.pid or not psutil.pid_exists(member.pid):
                    self._report.add(Death(at_s=self.now(), name=member.name, exit_code=0))
        self._over = True
        self._asking.set()
        await asyncio.gather(*clients)
        await self._rest()
        self._report.add(End(at_s=self.now(), num_workers=len(members)))

    # ------------------------------------------------------------ faults

    async def _kill(self, number: int, state: State) -> float:
        """Seconds until a successor had adopted the pools."""
        seen = await self._find(state)
        status = life.status(APP)
        killed_at = self.now()
        os.kill(status.pid, signal.SIGKILL)
        self._asking.set()
        self._report.add(
            Fault(
                at_s=killed_at,
                number=number,
                what=CONTROLLER,
                victims=("controller",),
                incarnations=(f"{APP}-{status.pid}",),
                pids=(status.pid,),
                state=state if seen else State.ANY,
                seen=seen,
                busy=psutil.cpu_percent() / 100,
            )
        )
        await self._successor(status.pid)
        self._report.add(Healed(at_s=self.now(), number=number))
        return self.now() - killed_at

    async def _successor(self, of: int) -> Status:
        async with asyncio.timeout(SUCCESSOR_S):
            while True:
                with suppress(RayError, ValueError):
                    status = await asyncio.to_thread(life.status, APP)
                    if status.pid != of and status.revision >= 0:  # an ingress has brought the config again
                        return status

    async def _find(self, state: State) -> str:
        """What was seen when some worker was in that state; empty: none was."""
        if state is State.IDLE:
            self._asking.clear()
            while self._num_open:
                await asyncio.sleep(0.01)
            return "no client asks"
        self._asking.set()
        await asyncio.sleep(self._random.uniform(0.0, 0.5))
        deadline = time.monotonic() + FIND_S
        names = {member.incarnation: member.name for member in self._app.members()}
        while time.monotonic() < deadline:
            loads = {names[incarnation]: answer.load for incarnation, answer in (await self._app.ask()).items()}
            sources = [load for name, load in loads.items() if name.startswith("prefill")]
            sinks = [load for name, load in loads.items() if name.startswith("decode")]
            holds = {
                State.PREFILL: any(load.num_running for load in sources),
                State.TRANSFER: any(load.num_leases for load in sources) and any(load.num_pulling for load in sinks),
                State.DECODE: any(load.num_running for load in sinks),
            }
            if holds[state]:
                num_running = sum(load.num_running for load in loads.values())
                return f"{num_running} running, {sum(load.num_pulling for load in sinks)} pulling"
            await asyncio.sleep(0.002)
        return ""

    # ------------------------------------------------------------ clients

    async def _client(self) -> None:
        while not self._over:
            await self._asking.wait()
            if not self._over:
                self._num_open += 1
                try:
                    await self._ask(self._random.choice(self._asked))
                finally:
                    self._num_open -= 1

    async def _ask(self, question: Question) -> None:
        sampling = question.samplings[0]
        name = f"{INGRESS}-{next(self._ids)}"
        self._report.add(Asked(at_s=self.now(), request=name, question=question.number, sample=0, ingress=INGRESS))
        error, num_tokens, ended = "", 0, False
        try:
            url = f"{self._app.app.url}/v1/completions"
            async with self._app.client.stream("POST", url, json=self._body(question, sampling)) as answer:
                async for line in answer.aiter_lines():
                    text = line.removeprefix("data: ")
                    if answer.status_code != 200 or '"error"' in text:
                        error = f"{answer.status_code} {text}"
                    elif text == "[DONE]":
                        ended = True
                    elif text:
                        tokens = [token for choice in json.loads(text)["choices"] for token in choice["token_ids"]]
                        if tokens:
                            at_s = self.now()
                            self._report.add(Got(at_s=at_s, request=name, first_index=num_tokens, tokens=tuple(tokens)))
                        num_tokens += len(tokens)
        except httpx.HTTPError as broken:
            error = repr(broken)
        if not ended:
            error = error or "the stream ended without its last word"
        self._report.add(
            Ended(at_s=self.now(), request=name, outcome="failed" if error else "ok", error=error, num_attempts=1)
        )

    def _body(self, question: Question, sampling: SamplingParams) -> dict[str, object]:
        return {
            "model": self._app.app.config.served_name,
            "prompt": list(question.prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            "seed": sampling.seed,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    # ------------------------------------------------------------ rest

    async def _rest(self) -> None:
        deadline = time.monotonic() + REST_S
        while time.monotonic() < deadline:
            if not any(is_held(answer.load) for answer in (await self._app.ask()).values()):
                break
            await asyncio.sleep(0.05)
        names = {member.incarnation: member.name for member in self._app.members()}
        for cleared in (False, True):
            for incarnation, answer in (await self._app.ask(clear=cleared)).items():
                self._report.add(rest_of(names[incarnation], answer.load, self.now(), cleared=cleared))


def run_served(campaign: Campaign, report: Report, say: Callable[[str], None]) -> None:
    """One prefill and two decode workers, two ingress replicas."""
    asked = answered(campaign.num_questions, campaign.seed)
    config = parse(
        {
            "name": APP,
            "model": {"path": str(checkpoint(FAMILY)), "served_name": "model"},
            "kv": {"num_blocks": 224, "block_size": 16},
            "scheduler": {"max_sequences": 16, "max_batched_tokens": 64, "chunk_tokens": 32},
            "pools": {"prefill": {"workers": 1}, "decode": {"workers": 2}},
            "words": {"heartbeat_timeout_s": 20.0},
            "transfer": {"late_read_s": 0.5, "stuck_read_s": 2.0},
            "http": {"port": 0, "replicas": 2},
            "log": {"level": "error"},
        }
    )
    report.add(
        Run(
            seed=campaign.seed,
            commit=commit(),
            num_faults=campaign.num_faults,
            heartbeat_timeout_s=config.words.heartbeat_timeout_s,
            step_timeout_s=config.words.step_timeout_s,
        )
    )
    write_expected(report, asked)
    with asyncio.Runner() as runner, served_app(config, runner) as app:
        runner.run(Served(app, campaign, report, [answer.question for answer in asked]).run(say))
