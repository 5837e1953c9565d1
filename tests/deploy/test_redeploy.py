"""What changes under a running app without a client noticing: two ingress replicas under load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from cluster.config import SluiceConfig
from cluster.config_file import parse
from cluster.errors import SluiceError
from cluster.membership import Membership
from deploy import life
from deploy.local_app import LocalApp
from tests.support.checkpoints import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_TOKENS = 40


def config(decode: int, **changes: object) -> SluiceConfig:
    return parse(
        {
            "name": "redeploy",
            "model": {"path": str(checkpoint("llama")), "served_name": "model"},
            "kv": {"num_blocks": 128, "block_size": 8},
            "pools": {"prefill": {"workers": 1}, "decode": {"workers": decode}},
            "http": {"port": 0, "replicas": 2},
            **changes,
        }
    )


@dataclass
class Load:
    """Streams without pause, several at a time; every one must be the same, whole and without an error."""

    url: str
    num_streams: int = 3
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    progress: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Load:
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(self.num_streams)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        prompt = [number + 3, 7, 11, 13] * 5
        body = {
            "model": "model", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        expected: list[int] = []
        while not self.stopping.is_set():
            try:
                answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
                tokens = answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else []
            except (httpx.HTTPError, ValueError) as error:
                answer, tokens = None, []
                self.failures.append(repr(error))
            if answer is not None and (len(tokens) != NUM_TOKENS or (expected and tokens != expected)):
                self.failures.append(f"{answer.status_code} {answer.text[:300]}")
            expected = expected or tokens
            with self.progress:
                self.num_done += 1
                self.progress.notify_all()

    def wait_for(self, num_more: int) -> None:
        with self.progress:
            target = self.num_done + num_more
            assert self.progress.wait_for(lambda: self.num_done >= target, 60), f"the load stands: {self.failures}"
        assert not self.failures


@pytest.fixture(scope="module")
def app() -> Iterator[LocalApp]:
    app = LocalApp(config(1), lambda _: None)
    try:
        app.start()
        yield app
    finally:
        app.stop()


def members() -> Membership:
    return Membership.from_wire(life.status("redeploy").membership)


def test_a_redeploy_with_another_pool_size_under_load_loses_nothing(app: LocalApp) -> None:
    before = members()
    with Load(app.url) as load:
        load.wait_for(3)
        app.redeploy(config(2))
        load.wait_for(10)
        grown = members()
        app.redeploy(config(1))
        load.wait_for(10)
    assert {m.incarnation for m in before.members} < {m.incarnation for m in grown.members}
    assert [m.name for m in grown.members] == ["decode-0", "decode-1", "prefill-0"]


def test_a_redeploy_that_cannot_start_says_why_and_changes_nothing(app: LocalApp) -> None:
    with Load(app.url) as load:
        load.wait_for(3)
        with pytest.raises(SluiceError, match=r"http\.api_keys_file: /nowhere cannot be read"):
            app.redeploy(config(1, http={"port": 0, "replicas": 2, "api_keys_file": "/nowhere"}))
        load.wait_for(5)


def test_deletion_leaves_nothing(app: LocalApp) -> None:
    assert app._cluster is not None
    directory = app._cluster.directory
    processes = app._cluster.processes()
    assert len(processes) > 5
    app.stop()
    assert [p.pid for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not directory.exists()
