"""What people see of a cluster: the figures, and the one file that shows them."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from cluster.config import SluiceConfig
from cluster.exporter import Exporter
from cluster.membership import MemberState
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.words_config import WordsConfig
from deploy.api_keys import ApiKeys
from deploy.api_service import ApiService
from deploy.status_page import NUM_ROUTES, add_status_page, pages_of
from router.route_book import RouteSummary
from router.status import pairs_told
from tests.support.api import complete, front_door
from tests.support.routing import Stage, eventually
from tests.support.scripted_worker import FOREVER, ScriptedWorker

PAGE = Path(__file__).parents[2] / "deploy" / "static" / "status.html"
KEY = "a-key-of-16-chars-or-more"
STATUS = "app model num_open num_pairs num_replicas pairs policy pools ready reason replica routes workers"
POOL = "max_workers min_workers name num_members num_ready roles workers"
WORKER = "connected incarnation leaving name pid pool roles shards state"
SHARD = (
    "draining groups num_leases num_pulling num_running num_waiting prefill_tokens_per_s "
    "queued_encoder_tokens queued_prefill_tokens shard"
)
GROUP = "cached filling free name num_blocks quarantined ready"
PAIR = "bytes_per_s sink source transport warm"
ROUTE = (
    "age_s attempts blocks bytes decode encode fetches_from hit_tokens num_tokens prefill prefill_ms reason "
    "request_id state transfer_ms"
)
CONFIG = SluiceConfig.model_validate({"model": {"path": "/models/tiny"}, "name": "chat"})


def add(app: FastAPI, service: ApiService, replicas: Callable[[], list[str]] = list) -> None:
    add_status_page(app, CONFIG, service.router, "ingress-0", replicas)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def told_by(source: ScriptedWorker) -> pb.LoadReport:
    group = pb.GroupLoad(name="self", num_blocks=10, free=4, filling=1, ready=2, cached=3)
    pair = pb.PairReport(source_incarnation=source.incarnation, warm=True, transport="nixl", bytes_per_s=2e9)
    return pb.LoadReport(num_running=3, num_waiting=2, queued_prefill_tokens=70, groups=[group], pairs=[pair])


def test_what_is_told(stage: Stage) -> None:
    """Names are whatever somebody called a worker; they travel as they are, in JSON."""
    prefill, decode = stage.prefill("<b>prefill-0"), stage.decode("decode-0", FOREVER)
    gone = stage.decode("decode-1", FOREVER)
    gone.state, gone.load = MemberState.STARTING, told_by(prefill)
    decode.load = told_by(prefill)
    elsewhere = RouteSummary(
        **dict.fromkeys(("fetches_from", "encode")),
        **dict.fromkeys(("state", "decode", "prefill", "reason"), "there"),
        **dict.fromkeys(("blocks", "bytes", "num_tokens", "hit_tokens", "attempts"), 0),
        **dict.fromkeys(("transfer_ms", "prefill_ms"), 0.0),
        request_id="of another replica",
        age_s=1e6,
    )
    exporter = Exporter(Metrics(), WordsConfig(), pages_of(lambda _: None, lambda count: (elsewhere,) * count))
    addresses = ["127.0.0.1:1", exporter.start()]  # nobody listens on the first
    try:
        with front_door(
            None, policy="kv_aware", local_prefill="fallback", add=partial(add, replicas=lambda: addresses)
        ) as door:
            door.connect(prefill, decode, gone)
            gone.stop()
            door.run(eventually(lambda: not door.router.fleet(9).workers[2].connected))
            complete(door).raise_for_status()
            told = httpx.get(f"{door.url}/status").raise_for_status().json()
    finally:
        exporter.stop()
    assert (told["app"], told["model"], told["policy"]) == ("chat", "tiny", "kv_aware")
    assert (told["ready"], told["reason"], told["replica"], told["num_replicas"]) == (True, "", "ingress-0", 3)
    pools = {pool["name"]: (pool["num_ready"], pool["num_members"], pool["workers"]) for pool in told["pools"]}
    assert pools == {"prefill": (1, 1, 1), "decode": (1, 2, 1)}
    workers = {worker["name"]: worker for worker in told["workers"]}
    assert list(workers) == ["<b>prefill-0", "decode-0", "decode-1"]
    assert workers["decode-1"]["state"] == "starting" and workers["decode-1"]["shards"] == []
    assert workers["decode-0"]["pid"] == 4711
    shard = workers["decode-0"]["shards"][0]
    assert (shard["num_running"], shard["num_waiting"], shard["queued_prefill_tokens"]) == (3, 2, 70)
    group = shard["groups"][0]
    assert sum(group[state] for state in ("free", "filling", "ready", "cached", "quarantined")) == group["num_blocks"]
    pair = {"sink": "decode-0", "source": "<b>prefill-0", "warm": True, "transport": "nixl", "bytes_per_s": 2e9}
    assert told["pairs"] == [pair] and told["num_pairs"] == 1
    route, *others = told["routes"]
    assert (route["decode"], route["prefill"], route["state"]) == ("decode-0", "<b>prefill-0", "length")
    assert (route["blocks"], route["bytes"], route["reason"], route["attempts"]) == (3, 3000, "the only way", 1)
    assert [each["request_id"] for each in others] == [elsewhere.request_id] * (NUM_ROUTES - 1)
    shapes = {STATUS: told, POOL: told["pools"][0], WORKER: workers["decode-0"], SHARD: shard, GROUP: group}
    for names, value in (shapes | {PAIR: pair, ROUTE: route}).items():
        assert " ".join(sorted(value)) == names


def test_figures_need_a_key_and_the_page_does_not(stage: Stage) -> None:
    keys = ApiKeys.parse([f"ann {KEY}"], "here", "here")
    with front_door(None, api_keys=keys, add=add) as door:
        page = httpx.get(door.url)
        assert page.status_code == 200 and page.text == PAGE.read_text()
        assert page.headers["content-type"].startswith("text/html")
        assert httpx.get(f"{door.url}/status").status_code == 401
        told = httpx.get(f"{door.url}/status", headers={"authorization": f"Bearer {KEY}"})
        assert told.status_code == 200 and told.json()["ready"] is False and told.json()["reason"]


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_stands_alone() -> None:
    """No address of anything outside, nothing that its policy forbids, and no way from a name to markup."""
    text = PAGE.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    elements = Elements()
    elements.feed(text)
    attributes = [(tag, name, value) for tag, attrs in elements.found for name, value in attrs.items()]
    assert [each for each in attributes if each[1] in ("src", "href", "srcset")] == [("link", "href", "data:,")]
    assert not [each for each in attributes if each[1] == "style" or each[1].startswith("on")]
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\b|new Function|setHTML"
    )
    assert not re.search(sinks, text)
    labelled = {attrs["for"] for tag, attrs in elements.found if tag == "label"}
    assert labelled == {attrs["id"] for tag, attrs in elements.found if tag == "input"}


def test_the_policy_names_what_the_page_has() -> None:
    text = PAGE.read_text()
    with front_door(None, add=add) as door:
        headers = httpx.get(door.url).headers
    policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (body,) = re.findall(f"(?s)<{tag}>(.*)</{tag}>", text)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert headers["x-content-type-options"] == "nosniff"


def test_of_many_pairs_the_cold_and_the_slow_are_told() -> None:
    pairs = [
        pb.PairReport(source_incarnation=f"s{index}", warm=index != 7, transport="nixl", bytes_per_s=1e9 - index)
        for index in range(20)
    ]
    told = pairs_told([("decode-0", pb.LoadReport(pairs=pairs))], {"s7": "prefill-7"}, 3)
    assert [(pair.source, pair.warm) for pair in told] == [("prefill-7", False), ("s19", True), ("s18", True)]
