"""Streams through the public port without pause, for what must change under them unnoticed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import httpx

NUM_TOKENS = 40


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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(70)
        if kind is None:
            assert not any(thread.is_alive() for thread in self.threads)
            assert not self.failures

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
