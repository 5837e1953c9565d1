"""What the front door traces, as a real receiver got it; and what traces do where nobody takes them."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from cluster.config import LogConfig
from cluster.log import Log
from cluster.metrics import Outcome
from cluster.protos import worker_pb2 as pb
from cluster.traces_config import TracesConfig
from deploy.traces import Traces
from tests.support.api import PROMPT, front_door
from tests.support.otlp_receiver import OtlpReceiver, Span, otlp_receiver
from tests.support.routing import DEADLINE_S, Stage, eventually
from tests.support.scripted_worker import FOREVER, Fail, Say, Wait

ROOT = Path(__file__).parents[2]
ROOMS = ("cluster", "kvtransfer", "router", "workers", "deploy")
SENT = "00-0af7651916cd43dd8448eb211c803{:03d}-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as process:
        yield process


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def traces_to(endpoint: str, stream: io.StringIO | None = None, sample_rate: float = 1.0) -> Traces:
    log = Log.open("ingress", LogConfig(format="json"), stream)
    config = TracesConfig(endpoint=endpoint, sample_rate=sample_rate)
    return Traces(config, app="chat", instance="ingress-0", model="tiny", log=log)


def attempts(root: Span) -> list[Span]:
    return [child for child in root.find("sequence").children if child.name.startswith("attempt")]


def test_attempts_samples_and_clients_that_leave(receiver: OtlpReceiver, stage: Stage) -> None:
    """No request is traced but those whose client asks for it."""
    traces = traces_to(receiver.endpoint, sample_rate=0.0)
    full, other = stage.decode("decode-0", Fail(pb.BUSY)), stage.decode("decode-1", FOREVER)
    with front_door(None, policy="round_robin", traces=traces) as door:
        door.connect(full, other)

        def ask(number: int, **body: object) -> httpx.Response:
            headers = {"traceparent": SENT.format(number)}
            told = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, **body}
            return httpx.post(f"{door.url}/v1/completions", json=told, headers=headers)

        for number in range(2):  # one of them at least begins with the worker that is full
            assert ask(number).status_code == 200
        full.script = other.script = [Wait(), FOREVER]
        with ThreadPoolExecutor(1) as client:
            samples_asked = client.submit(ask, 2, n=3)
            # A leader that has ended when its followers come has none.
            door.run(eventually(lambda: full.num_held + other.num_held == 3))
            full.go_on()
            other.go_on()
            assert samples_asked.result(DEADLINE_S).status_code == 200
        full.script = other.script = [Say(2), Fail(pb.INVALID, "the prompt was: secret")]
        assert ask(3).status_code == 400
        other.script = full.script = [Say(2), Wait()]
        with httpx.stream(
            "POST",
            f"{door.url}/v1/completions",
            json={"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "stream": True},
            headers={"traceparent": SENT.format(4)},
        ) as stream:
            next(stream.iter_lines())
        assert httpx.post(f"{door.url}/v1/completions", json={"model": "tiny", "prompt": []}).status_code == 400
        door.run(eventually(lambda: door.router.num_open == 0))
    traces.stop()
    told = receiver.traces()
    roots = [told[SENT.format(number).split("-")[1]] for number in range(5)]
    assert len(told) == len(roots), "nobody else asked for a trace"
    assert [root.attributes["sluice.outcome"] for root in roots] == ["ok", "ok", "ok", "invalid", "cancelled"]

    moved = next(attempts(root) for root in roots[:2] if len(attempts(root)) == 2)
    assert [each.attributes["sluice.worker"] for each in moved] == ["decode-0", "decode-1"]
    assert (moved[0].error, moved[1].error) == ("busy: the script says so", "")
    assert [each.attributes["sluice.replay"] for each in moved] == [False, False], "it had not begun"
    assert [each.attributes["sluice.tokens"] for each in moved] == [0, 8]

    samples = roots[2].all("sequence")
    assert len(samples) == roots[2].attributes["sluice.num_sequences"] == 3
    follows = [sample.children[-1].attributes.get("sluice.plan.follows") for sample in samples]
    leader = next(s for s, leads in zip(samples, follows, strict=True) if leads is None)
    assert follows.count(leader.attributes["sluice.request_id"]) == 2

    (invalid,) = attempts(roots[3])
    assert invalid.error == "invalid" and not roots[3].error, "what a client did wrong is no fault of ours"
    assert "secret" not in json.dumps(receiver.rows())
    (left,) = attempts(roots[4])
    assert left.attributes["sluice.tokens"] in (1, 2) and not left.error and "first token" in left.events


def test_a_receiver_that_refuses_costs_one_line(receiver: OtlpReceiver) -> None:
    stream = io.StringIO()
    address = f"{receiver.url}/elsewhere"
    traces = traces_to(address, stream)
    for _ in range(3):
        trace = traces.begin("/v1/completions", {}, "some-id")
        assert trace is not None
        trace.journal()  # of a sequence that never ran
        trace.end(Outcome.BUSY)
    traces.stop()
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (line["event"], line["level"], line["address"]) == ("traces are not delivered", "warning", address)


def test_nothing_imports_opentelemetry_before_traces_are_on() -> None:
    """Only inside a function, or for the type checker, are the traces imported, and through them the library."""
    found: set[str] = set()
    for path in sorted(each for room in ROOMS for each in (ROOT / room).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name == "deploy.traces" or name.partition(".")[0] == "opentelemetry" for name in names):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"deploy/traces.py"}


def test_a_share_of_the_requests_is_traced() -> None:
    traces = traces_to("http://127.0.0.1:1/v1/traces", sample_rate=0.25)
    num_traced = sum(traces.begin("/v1/completions", {}, "") is not None for _ in range(400))
    assert 60 <= num_traced <= 140  # of 100; five standard deviations are 43
    assert traces.begin("/v1/completions", {"traceparent": SENT.format(0)}, "") is not None
    assert traces.begin("/v1/completions", {"traceparent": SENT.format(0)[:-1] + "0"}, "") is None
    traces.stop()
