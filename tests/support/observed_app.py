"""An app under load, cancels, deaths and a storm, that a real Prometheus scrapes all the while.

    python -m tests.support.observed_app [--into docs/images]

draws the dashboards from what it told.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx

from cluster.config import SluiceConfig
from cluster.config_file import parse
from cluster.membership import Member, Membership, MemberState
from deploy import life
from deploy.local_app import LocalApp
from helm import pictures
from helm.prometheus import Prometheus, Span
from helm.record import Record, ask
from tests.support.checkpoints import VOCAB_SIZE, checkpoint
from tests.support.prometheus_server import ROOT, WINDOW_S, prometheus

APP = "observed"
NUM_WORKERS = 4
NUM_TARGETS = NUM_WORKERS + 3  # two replicas and the controller
NUM_CLIENTS = 8
CANCELLED, REFUSED, OK = "cancelled", "refused", "ok"
_LOOKS = 600  # at what is waited for, each after an answer more
_ANSWER_S = 90.0


def config() -> SluiceConfig:
    """The pools are scaled, but have no room to grow: what they need is told all the same."""
    pool = {"workers": 2, "min_workers": 2, "max_workers": 2}
    return parse(
        {
            "name": APP,
            "model": {"path": str(checkpoint("llama")), "served_name": "model"},
            "engine": {"speculation": "ngram", "ngram_tokens": 1, "draft_tokens": 2},
            "kv": {"num_blocks": 192, "block_size": 16},
            "scheduler": {"max_sequences": 8, "max_batched_tokens": 128, "chunk_tokens": 64},
            "pools": {"prefill": pool, "decode": pool},
            "autoscaling": {"enabled": True},
            "limits": {"max_requests": 16, "max_queued": 8},
            "words": {"heartbeat_timeout_s": 20.0, "step_timeout_s": 30.0},  # a busy machine is no failure here
            "http": {"port": 0, "replicas": 2},
            "log": {"level": "error"},
        }
    )


@dataclass
class Crowd:
    """Clients that ask without pause; their chats share prefixes, and every fifth answer is broken off."""

    url: str
    outcomes: Counter[str] = field(default_factory=Counter)
    stopping: threading.Event = field(default_factory=threading.Event)
    progress: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Crowd:
        self.threads = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(NUM_CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(_ANSWER_S)

    def wait_for(self, num_more: int) -> None:
        with self.progress:
            target = self.outcomes.total() + num_more
            assert self.progress.wait_for(lambda: self.outcomes.total() >= target, _ANSWER_S), "the load stands"

    def until(self, holds: Callable[[], object], what: str) -> None:
        """While the load goes on."""
        for _ in range(_LOOKS):
            if holds():
                return
            self.wait_for(1)
        raise AssertionError(f"still not so: {what}")

    def storm(self, num_requests: int) -> None:
        """All at once, beside the others."""
        threads = [threading.Thread(target=self._ask, args=(Random(-seed), False)) for seed in range(num_requests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_ANSWER_S)

    def _ask_on(self, seed: int) -> None:
        random = Random(seed)
        while not self.stopping.is_set():
            self._ask(random, random.random() < 0.2)

    def _ask(self, random: Random, leaves: bool) -> None:
        topic = Random(random.randrange(4))
        prompt = [topic.randrange(3, VOCAB_SIZE) for _ in range(96)]
        prompt += [random.randrange(3, VOCAB_SIZE) for _ in range(random.randint(8, 160))]
        body = {
            "model": "model", "prompt": prompt, "max_tokens": random.randint(16, 64), "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        if random.random() < 0.5:  # a text of few tokens, which can be guessed
            body["logit_bias"] = {str(token): 50 for token in range(3, 7)}
        outcome = self._outcome(body, leaves)
        with self.progress:
            self.outcomes[outcome] += 1
            self.progress.notify_all()

    def _outcome(self, body: dict[str, object], leaves: bool) -> str:
        num_lines, last = 0, ""
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=body, timeout=_ANSWER_S, trust_env=False
            ) as answer:
                for line in filter(None, answer.iter_lines()):
                    num_lines, last = num_lines + 1, line
                    if leaves and num_lines == 5:
                        return CANCELLED
                if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
                    return REFUSED
                return OK if last == "data: [DONE]" else f"{answer.status_code} {last}"
        except httpx.HTTPError as error:
            return repr(error)


@dataclass(frozen=True, slots=True)
class Observed:
    """What happened, and the server that saw it. The load goes on."""

    app: LocalApp
    server: Prometheus
    crowd: Crowd
    began_s: float
    moments: dict[str, float]

    def span(self) -> Span:
        """Until now."""
        return Span(self.began_s, time.time(), 1.0, WINDOW_S)

    def record(self) -> Record:
        story = "a tiny model on 2 CPU cores, 2 prefill and 2 decode workers"
        return ask(self.server, APP, self.span(), story, self.moments)


def members() -> tuple[Member, ...]:
    return Membership.from_wire(life.status(APP).membership).members


@contextmanager
def observed(directory: Path) -> Iterator[Observed]:
    """A killed decode worker, a killed prefill worker and a storm of requests lie behind it."""
    app = LocalApp(config(), lambda _: None)
    try:
        app.start()
        with prometheus(app.url, directory) as server, Crowd(app.url) as crowd:
            moments: dict[str, float] = {}
            crowd.until(lambda: len(server.between("up == 1", _now())) == NUM_TARGETS, "all targets are scraped")
            seen = Observed(app, server, crowd, time.time(), moments)
            for victim in ("decode-0", "prefill-1"):
                crowd.wait_for(60)
                _kill(victim, crowd, moments)
            crowd.wait_for(60)
            moments["a storm of requests"] = time.time()
            crowd.storm(60)
            crowd.wait_for(60)
            strange = crowd.outcomes.keys() - {OK, CANCELLED, REFUSED}
            assert not strange, f"requests ended otherwise than they should: {strange}"
            yield seen
    finally:
        app.stop()


def _kill(name: str, crowd: Crowd, moments: dict[str, float]) -> None:
    """Until its successor serves."""
    (victim,) = (member for member in members() if member.name == name)
    os.kill(victim.pid, signal.SIGKILL)
    moments[f"{name} killed"] = time.time()

    def replaced() -> bool:
        now = members()
        ready = [member for member in now if member.state is MemberState.READY]
        return len(ready) == NUM_WORKERS and victim.incarnation not in {member.incarnation for member in now}

    crowd.until(replaced, f"{name} has a successor")


def _now() -> Span:
    return Span(time.time(), time.time(), 1.0, WINDOW_S)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.observed_app")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, observed(Path(directory)) as seen:
        record = seen.record()
    for path in pictures.write(record, options.into):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
