"""How a request was routed, by the id of its answer. Each replica knows its own; the one that is asked asks the others.

Between replicas it goes through the port of their metrics, where paths, not secrets, are known: a route has names,
counts and costs, nothing of the prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import httpx
from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.responses import Response

from deploy.openai_errors import body, response
from router.route_book import RouteTold

_ANSWER_S: Final = 2.0
_ROUTE: Final = TypeAdapter(RouteTold)

Tell = Callable[[str], RouteTold | None]


def page_of(tell: Tell) -> Callable[[str], bytes | None]:
    """By path, what a replica tells of its own requests on the port of its metrics. Any thread."""

    def page(path: str) -> bytes | None:
        told = tell(path.removeprefix("/requests/").removesuffix("/route"))
        return None if told is None else _ROUTE.dump_json(told)

    return page


def add_route_page(app: FastAPI, tell: Tell, replicas: Callable[[], Iterable[str]]) -> None:
    """`replicas`: addresses, host:port, of the metrics of the other replicas, asked anew each time."""

    @app.get("/v1/requests/{answer_id}/route")
    async def route(answer_id: str) -> Response:
        request_id = answer_id.rpartition("-")[2]  # without what its kind of answer puts before it
        told = tell(request_id)
        page = None if told is None else _ROUTE.dump_json(told)
        if page is None and request_id.isalnum():
            page = await _ask(replicas(), request_id)
        if page is None:
            text = f"no replica knows how {answer_id[:80]!r} was routed; ask sooner, or raise router.kept_routes"
            return response(404, body(404, text, code="unknown_request"))
        return Response(page, media_type="application/json")


async def _ask(addresses: Iterable[str], request_id: str) -> bytes | None:
    """Of all replicas at once; one that does not answer knows nothing."""
    async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False) as client:
        urls = [f"http://{address}/requests/{request_id}/route" for address in addresses]
        answers = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    found = (each.content for each in answers if isinstance(each, httpx.Response) and each.status_code == 200)
    return next(found, None)
