"""What the HTTP API refuses for its workers' sake or its settings': scripted workers, keys, other limits.

What is wrong with a request itself is sent to the public port, in the folder beside this file.
"""

from __future__ import annotations

import json
from hashlib import sha256

import httpx
import openai
import pytest

from cluster.config import LimitsConfig
from cluster.hashing import chain_root, salt_of
from cluster.protos import worker_pb2 as pb
from deploy.api_keys import ApiKeys, KeyLimits
from deploy.tokenizer import Tokenizer
from tests.support.api import PROMPT, FrontDoor, complete, error, front_door
from tests.support.scripted_worker import FOREVER, Action, Fail, Say, ScriptedWorker, Wait


def test_what_is_refused_is_counted_and_reaches_no_worker(door: FrontDoor, worker: ScriptedWorker) -> None:
    before = door.outcomes("invalid")
    refused = error(complete(door, temper=1), 400)
    assert refused["message"] == "unrecognized request argument supplied: temper; remove it"
    error(complete(door, model="gpt"), 404)
    assert door.outcomes("invalid") == before + 2 and worker.submits == []


def test_too_long_is_413(door: FrontDoor, tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    refused = error(complete(door, prompt=[1] * 512), 413)
    assert refused["code"] == "context_length_exceeded" and "context of 512" in refused["message"]
    assert "ask for at most 12" in error(complete(door, prompt=[1] * 500, max_tokens=13), 413)["message"]
    assert complete(door, prompt=[1] * 500, max_tokens=12).status_code == 200
    with front_door(tokenizer, limits=LimitsConfig(max_prompt_tokens=10, max_body_bytes=500)) as small:
        small.connect(worker)
        assert "11 tokens are over the limit of 10" in error(complete(small, prompt=[1] * 11), 413)["message"]
        assert error(complete(small, prompt="x" * 600), 413)["code"] == "body_too_large"
        body = json.dumps({"model": "tiny", "prompt": "x" * 600}).encode()
        chunked = httpx.post(f"{small.url}/v1/completions", content=iter([body[:300], body[300:]]))
        assert error(chunked, 413)["code"] == "body_too_large"


def test_a_wrong_key_is_401(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    right = "a right key, quite long".replace(" ", "-")
    keys = ApiKeys({"ann": sha256(right.encode()).digest(), "bob": sha256(b"another").digest()})
    with front_door(tokenizer, api_keys=keys) as door:
        door.connect(worker)
        assert error(complete(door), 401)["code"] == "invalid_api_key"
        for key in ("wrong", f"{right}x", "ann", sha256(right.encode()).hexdigest()):
            client = openai.OpenAI(base_url=f"{door.url}/v1", api_key=key, max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                client.completions.create(model="tiny", prompt=PROMPT)
        client = openai.OpenAI(base_url=f"{door.url}/v1", api_key=right, max_retries=0)
        assert client.completions.create(model="tiny", prompt=PROMPT).choices[0].finish_reason == "length"
        assert httpx.get(f"{door.url}/health").status_code == 200


def test_what_is_over_a_limit_of_its_key_is_429_and_says_which(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    limits = {
        "rare": KeyLimits(requests_per_minute=2),
        "brief": KeyLimits(tokens_per_minute=12, max_tokens=8, max_prompt_tokens=4),
        "single": KeyLimits(max_concurrent=1),
    }
    keys = ApiKeys({name: sha256(name.encode()).digest() for name in limits}, limits)

    def ask(name: str, **body: object) -> httpx.Response:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, **body}
        headers = {"authorization": f"Bearer {name}"}
        return httpx.post(f"{door.url}/v1/completions", json=body, headers=headers, timeout=30)

    with front_door(tokenizer, api_keys=keys) as door:
        door.connect(worker)
        assert [ask("rare").status_code for _ in range(2)] == [200, 200]
        refused = ask("rare")
        told = error(refused, 429)
        assert (told["type"], told["code"]) == ("rate_limit_error", "key_requests_per_minute")
        assert told["message"] == "your key's limit of 2 requests a minute is reached; retry later"
        assert 1 <= int(refused.headers["retry-after"]) <= 30

        assert "over your key's limit of 4" in error(ask("brief", prompt=[1] * 5), 413)["message"]
        assert "over your key's limit of 8" in error(ask("brief", max_tokens=9), 400)["message"]
        assert [ask("brief").status_code for _ in range(2)] == [200, 200]  # 11 tokens each: the second owes 10
        assert error(ask("brief"), 429)["code"] == "key_tokens_per_minute"

        worker.script = [Say(1), Wait(), FOREVER]
        body = {"model": "tiny", "prompt": PROMPT, "stream": True}
        headers = {"authorization": "Bearer single"}
        with httpx.stream("POST", f"{door.url}/v1/completions", json=body, headers=headers, timeout=30) as first:
            assert first.status_code == 200
            assert error(ask("single"), 429)["code"] == "key_max_concurrent"
            worker.go_on()
            first.read()
        worker.script = [FOREVER]
        assert ask("single").status_code == 200
        assert door.outcomes("busy") == 3
        assert door.metrics.value("sluice_ingress_rejections_total", {"limit": "key_max_concurrent"}) == 1


def test_a_salt_of_the_key_and_one_of_the_request_make_one(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    keys = ApiKeys(
        {name: sha256(name.encode()).digest() for name in ("ann", "bob")}, {"ann": KeyLimits(cache_salt="hers")}
    )
    with front_door(tokenizer, api_keys=keys) as door:
        door.connect(worker)
        roots: list[bytes] = []
        for name, body in (("ann", {}), ("ann", {"cache_salt": "x"}), ("bob", {"cache_salt": "x"}), ("bob", {})):
            body = {"model": "tiny", "prompt": PROMPT, **body}
            headers = {"authorization": f"Bearer {name}"}
            assert httpx.post(f"{door.url}/v1/completions", json=body, headers=headers).status_code == 200
            roots.append(worker.submits[-1].chain_root)
        salts = (salt_of("hers", ""), salt_of("hers", "x"), salt_of("", "x"))
        assert roots == [*(chain_root(worker.compatibility_hash, salt=salt) for salt in salts), b""]
        refused = httpx.post(f"{door.url}/v1/completions", json={**body, "cache_salt": ""}, headers=headers)
        assert "cache_salt" in error(refused, 400)["message"]


@pytest.mark.parametrize(
    ("script", "status", "outcome"),
    [
        ([Fail(pb.BUSY)], 429, "busy"),
        ([Fail(pb.INTERNAL)], 500, "failed"),
        ([Fail(pb.DEADLINE)], 504, "deadline"),
        ([Fail(pb.TOO_LONG)], 413, "invalid"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_their_status(
    door: FrontDoor, worker: ScriptedWorker, script: list[Action], status: int, outcome: str, stream: bool
) -> None:
    worker.script = script
    before = door.outcomes(outcome)
    response = complete(door, stream=stream)
    error(response, status)
    assert ("retry-after" in response.headers) == (status == 429)
    assert door.outcomes(outcome) == before + 1


def test_no_worker_is_503_and_health_says_so(door: FrontDoor, worker: ScriptedWorker) -> None:
    for path in ("health", "ready"):
        assert httpx.get(f"{door.url}/{path}").json() == {"status": "ok"}
    door.connect()
    for path in ("health", "ready"):
        sick = httpx.get(f"{door.url}/{path}")
        assert sick.status_code == 503 and sick.json()["reason"] == "no decode worker is ready"
    assert "no decode worker is ready (waited 0.3 s)" in error(complete(door), 503)["message"]


def test_a_deadline_is_504(door: FrontDoor, worker: ScriptedWorker) -> None:
    worker.script = [Wait()]
    assert "deadline" in error(complete(door, timeout_s=0.1), 504)["message"]


def test_a_full_house_is_429_at_once(tokenizer: Tokenizer, worker: ScriptedWorker) -> None:
    worker.script = [Say(1), Wait(), FOREVER]
    with front_door(tokenizer, limits=LimitsConfig(max_requests=1, max_queued=0)) as door:
        door.connect(worker)
        body = {"model": "tiny", "prompt": PROMPT, "stream": True}
        with httpx.stream("POST", f"{door.url}/v1/completions", json=body, timeout=30) as first:
            assert first.status_code == 200
            refused = complete(door)
            assert error(refused, 429)["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{door.url}/health").status_code == 200
            busy = httpx.get(f"{door.url}/ready")
            assert busy.status_code == 503 and busy.json()["reason"] == "the queue of this replica is full"
            worker.go_on()
            first.read()
