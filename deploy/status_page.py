"""The page that people open first, and what it shows: pools, workers, pairs, blocks, the last routes.

`/` is one static file without outside resources; it asks `/status` every second. Where API keys are asked for, the
page itself needs none and the figures do. Routes are those of all replicas: between replicas they go through the port
of their metrics, as in deploy/route_page.py.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import httpx
from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from cluster.config import SluiceConfig
from deploy.route_page import Tell, page_of
from router.route_book import RouteSummary
from router.router import Router
from router.status import PairTold, WorkerTold

NUM_ROUTES: Final = 30
MAX_PAIRS: Final = 200
_FRESH_S: Final = 0.5  # an answer counts for all who ask meanwhile
_ROUTES_PATH: Final = "/routes"
_ANSWER_S: Final = 1.0
_ROUTES: Final = TypeAdapter(tuple[RouteSummary, ...])
_JSON: Final = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTold:
    name: str
    roles: tuple[str, ...]
    workers: int
    """As configured; where the pool is scaled, what it begins with."""
    min_workers: int
    max_workers: int | None
    """null: the pool is not scaled."""
    num_ready: int
    num_members: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusTold:
    app: str
    model: str
    policy: str
    ready: bool
    reason: str
    """Why not."""
    replica: str
    """Which one answered."""
    num_replicas: int
    num_open: int
    """Requests of the replica that answered."""
    pools: tuple[PoolTold, ...]
    workers: tuple[WorkerTold, ...]
    num_pairs: int
    pairs: tuple[PairTold, ...]
    """Of them the cold ones first, then the slowest."""
    routes: tuple[RouteSummary, ...]
    """Of all replicas, the youngest first."""


_STATUS: Final = TypeAdapter(StatusTold)


def pages_of(tell: Tell, last: Callable[[int], tuple[RouteSummary, ...]]) -> Callable[[str], bytes | None]:
    """By path, what a replica tells of its own requests on the port of its metrics. Any thread."""
    route = page_of(tell)

    def page(path: str) -> bytes | None:
        return _ROUTES.dump_json(last(NUM_ROUTES)) if path == _ROUTES_PATH else route(path)

    return page


def add_status_page(
    app: FastAPI, config: SluiceConfig, router: Router, replica: str, replicas: Callable[[], Iterable[str]]
) -> None:
    """`replicas`: addresses, host:port, of the metrics of the other replicas, asked anew each time."""
    html = files("deploy").joinpath("static/status.html").read_text()
    headers = {
        "content-security-policy": _policy(html),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    made_at, made = -_FRESH_S, b""

    @app.get("/status", include_in_schema=False)
    async def status() -> Response:
        nonlocal made_at, made
        if time.monotonic() - made_at >= _FRESH_S:
            others = list(replicas())
            routes = [*router.last_routes(NUM_ROUTES), *await _ask(others)]
            told = _told(config, router, replica, 1 + len(others), routes)
            made_at, made = time.monotonic(), _STATUS.dump_json(told)
        return Response(made, media_type=_JSON, headers={"cache-control": "no-store"})


def _told(
    config: SluiceConfig, router: Router, replica: str, num_replicas: int, routes: Iterable[RouteSummary]
) -> StatusTold:
    ready, fleet = router.ready(), router.fleet(MAX_PAIRS)
    return StatusTold(
        app=config.name,
        model=config.served_name,
        policy=config.router.policy,
        ready=ready,
        reason="" if ready else router.why_not_ready(),
        replica=replica,
        num_replicas=num_replicas,
        num_open=router.num_open,
        pools=_pools(config, fleet.workers),
        workers=fleet.workers,
        num_pairs=fleet.num_pairs,
        pairs=fleet.pairs,
        routes=tuple(sorted(routes, key=lambda route: route.age_s)[:NUM_ROUTES]),
    )


def _pools(config: SluiceConfig, workers: Iterable[WorkerTold]) -> tuple[PoolTold, ...]:
    members = [(worker.pool, worker.state == "ready" and worker.connected) for worker in workers]
    return tuple(
        PoolTold(
            name=name,
            roles=tuple(role.value for role in pool.roles),
            workers=pool.workers,
            min_workers=pool.min_workers,
            max_workers=pool.max_workers if config.autoscaling.enabled else None,
            num_ready=members.count((name, True)),
            num_members=members.count((name, True)) + members.count((name, False)),
        )
        for name, pool in config.pools.items()
    )


def _policy(html: str) -> str:
    """Content-Security-Policy: nothing but this page's own script and style, and questions to this server."""

    def hashes(tag: str) -> str:
        found = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", html)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    own = f"script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


async def _ask(addresses: Iterable[str]) -> list[RouteSummary]:
    """Of all replicas at once; one that does not answer has none."""
    urls = [f"http://{address}{_ROUTES_PATH}" for address in addresses]
    if not urls:
        return []
    async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False, verify=False) as client:
        answers = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    routes: list[RouteSummary] = []
    for answer in answers:
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            try:
                routes += _ROUTES.validate_json(answer.content)
            except ValidationError:  # a replica of another release
                continue
    return routes
