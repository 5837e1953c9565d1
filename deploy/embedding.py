"""Vectors of prompts: the model's final hidden states, pooled by a worker, brought to length 1 here."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np

from cluster.errors import RequestError
from router.flight import RouterRequest
from router.router import Router

_T = TypeVar("_T")


class Embeddings:
    """Of several prompts, each a request of its own. They end together."""

    def __init__(self, router: Router, requests: Sequence[RouterRequest], *, max_running: int) -> None:
        self._router = router
        self._requests = requests
        self._max_running = max_running

    @property
    def request_id(self) -> str:
        """Of the first."""
        return self._requests[0].request_id

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.encoder_token_ids or request.prompt_token_ids) for request in self._requests)

    async def vectors(self) -> list[np.ndarray]:
        """Float32, each of length 1, in the order of the prompts. The first failure ends all."""
        return await together([self._vector(request) for request in self._requests], self._max_running)

    async def _vector(self, request: RouterRequest) -> np.ndarray:
        async with aclosing(self._router.generate(request)) as deltas:
            async for delta in deltas:
                if delta.embedding:
                    vector = np.array(delta.embedding, np.float64)
                    if not np.isfinite(vector).all():
                        raise RequestError(f"request {request.request_id}: the embedding is no number; report its id")
                    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
        raise RequestError(f"request {request.request_id} ended without an embedding; report its id")


async def together(asked: Sequence[Coroutine[Any, Any, _T]], max_running: int) -> list[_T]:
    """What each brings, in order. The first failure ends all."""
    slots = asyncio.Semaphore(max_running)

    async def in_turn(each: Coroutine[Any, Any, _T]) -> _T:
        try:
            async with slots:
                return await each
        finally:
            each.close()  # it may never have begun

    tasks = [asyncio.create_task(in_turn(each)) for each in asked]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def as_base64(vector: np.ndarray) -> str:
    """Little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
