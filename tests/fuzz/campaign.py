"""Kinds of cases against one public port, and what each must come to."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from deploy.tokenizer import Tokenizer
from tests.fuzz import bodies, sockets
from tests.fuzz.bodies import Json
from tests.fuzz.oracle import Answer, Oracle, check_error

_TIMEOUT_S: Final = 90.0
_SHORT_TIMEOUT_S: Final = 10.0  # a request that names less may run out of time


@dataclass(frozen=True)
class Kind:
    """`check` raises AssertionError, or what the connection raised."""

    cases: SearchStrategy[Any]
    check: Callable[[Any], None]


@dataclass
class Campaign:
    url: str
    oracle: Oracle
    statuses: dict[int, int] = field(default_factory=dict)
    """Answers by status; 0: the client did not stay for one."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    def kinds(self) -> dict[str, Kind]:
        size = self.oracle.vocab_size
        paths = st.sampled_from(bodies.PATHS)
        return {
            "completion": Kind(bodies.completions(size).map(lambda body: ("/v1/completions", body)), self.good),
            "chat": Kind(bodies.chats(size).map(lambda body: ("/v1/chat/completions", body)), self.good),
            "form": Kind(bodies.formed(size), self.formed),
            "embedding": Kind(bodies.embeddings(size).map(lambda body: ("/v1/embeddings", body)), self.good),
            "tokens": Kind(
                st.one_of(
                    bodies.tokenizing().map(lambda body: ("/tokenize", body)),
                    bodies.detokenizing(size).map(lambda body: ("/detokenize", body)),
                ),
                self.good,
            ),
            "repeat": Kind(st.tuples(bodies.completions(size), st.integers(0, 2**32)), self.repeat),
            "mutant": Kind(bodies.mutants(size), self.any),
            "writing": Kind(bodies.written_oddly(size), self.any),
            "json": Kind(st.tuples(paths, bodies.any_json().map(bodies.written_json)), self.any),
            "bytes": Kind(st.tuples(paths, st.binary(max_size=300)), self.any),
            "http": Kind(sockets.broken_http(), self.wire),
            "header": Kind(sockets.strange_headers(), self.wire),
            "crumbs": Kind(sockets.slow_and_many(), self.wire),
            "vanish": Kind(sockets.vanishing(size), self.wire),
        }

    # ------------------------------------------------------------ checks

    def good(self, case: tuple[str, Json]) -> None:
        """A valid body: 200, and all that follows."""
        path, body = case
        answer = self.post(path, bodies.written_json(body))
        assert answer.status == 200, f"{answer.status} {answer.content[:500]!r} to {path} {body}"
        self.oracle.check(path, body, answer)

    def formed(self, body: Json) -> None:
        """A whole answer is as its schema says."""
        answer = self.post("/v1/chat/completions", bodies.written_json(body))
        assert answer.status == 200, f"{answer.status} {answer.content[:500]!r} to {body}"
        whole = self.oracle.check("/v1/chat/completions", body, answer)
        assert whole is not None
        for said in whole.choices.values():
            if said.finish == "stop":
                jsonschema.validate(json.loads(said.text), body["response_format"]["json_schema"]["schema"])

    def repeat(self, case: tuple[Json, int]) -> None:
        """The same seed gives the same tokens, whole and as a stream."""
        body, chosen = case
        body = {name: value for name, value in body.items() if name != "best_of"} | {"seed": chosen}
        told = []
        for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            answer = self.post("/v1/completions", bodies.written_json(body | more))
            assert answer.status == 200, f"{answer.status} {answer.content[:500]!r}"
            whole = self.oracle.check("/v1/completions", body | more, answer)
            assert whole is not None
            told.append([(said.text, said.token_ids, said.finish) for _, said in sorted(whole.choices.items())])
        assert told[0] == told[1], told

    def any(self, case: tuple[str, bytes]) -> None:
        """Whatever it is: an answer that keeps its promises, or a refusal that says why."""
        path, content = case
        answer = self.post(path, content)
        if answer.status == 200:
            body = json.loads(content)
            assert isinstance(body, dict)
            if _is_plain(content):
                self.oracle.check(path, {name: value for name, value in body.items() if value is not None}, answer)
        else:
            check_error(answer, may_time_out=_names_short_time(content))

    def wire(self, case: sockets.Wire) -> None:
        answers = sockets.talk(self.url, case)
        for answer in answers:
            self._count(answer.status)
            ours = "x-request-id" in answer.headers
            if not ours:
                assert case.num_answers is None and answer.status in sockets.PROXY_STATUSES, answer
            elif answer.status >= 400:
                check_error(answer)
        if not answers:
            self._count(0)
        if case.num_answers is not None:
            assert [answer.status for answer in answers] == [200] * case.num_answers, answers
        if case.request_id is not None:
            assert [answer.headers["x-request-id"] for answer in answers] == [case.request_id]

    # ------------------------------------------------------------ the way there

    def post(self, path: str, content: bytes) -> Answer:
        """Over this thread's connection."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            parts = urlsplit(self.url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
            self._local.connection = connection
        try:
            connection.request("POST", path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            told = Answer(answer.status, headers, answer.read())
        except BaseException:
            connection.close()
            self._local.connection = None
            raise
        self._count(told.status)
        return told

    def _count(self, status: int) -> None:
        with self._lock:
            self.statuses[status] = self.statuses.get(status, 0) + 1


def oracle_of(tokenizer: Tokenizer, config: dict[str, Any]) -> Oracle:
    """`config`: of the checkpoint."""
    return Oracle(
        tokenizer=tokenizer,
        vocab_size=config["vocab_size"],
        max_model_len=config["max_position_embeddings"],
        eos_token_id=config["eos_token_id"],
        hidden_size=config["hidden_size"],
    )


def run(kind: Kind, num_cases: int, chosen_seed: int, failed: Callable[[Any, Exception], None] | None = None) -> None:
    """So many cases, the same for the same seed. `failed` hears of each and the run goes on; else the first raises."""

    @seed(chosen_seed)
    @settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.large_base_example,
        ],
    )
    @given(kind.cases)
    def each(case: Any) -> None:
        try:
            kind.check(case)
        except Exception as error:  # any of them is a finding
            if failed is None:
                raise
            failed(case, error)

    each()


def _names_short_time(content: bytes) -> bool:
    try:
        timeout_s = json.loads(content).get("timeout_s")
    except (ValueError, AttributeError, RecursionError):
        return False
    return bodies.is_number(timeout_s) and timeout_s < _SHORT_TIMEOUT_S


def _is_plain(content: bytes) -> bool:
    """No name stands twice, so that nobody doubts what was asked."""

    def each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(names) != len(set(names)):
            raise KeyError("twice")
        return dict(pairs)

    try:
        json.loads(content, object_pairs_hook=each)
    except KeyError:
        return False
    return True
