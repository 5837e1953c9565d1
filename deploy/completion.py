"""One completion as its client sees it: tokens of the router turned into text, cut at stop strings, and measured."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import RequestError
from cluster.metrics import Metrics, Outcome
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason
from deploy.openai_schema import Finish, PromptDetails, RouteReport, Usage, WorkerRoute
from deploy.stream import Detokenizer, StopFinder
from router.flight import RouterRequest, TokenDelta
from router.plan import Plan
from router.router import Router


class Tally:
    """One request in the ingress's metrics, from its arrival to its end, counted once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.arrived_at = time.monotonic()
        self.first_at: float | None = None
        self.last_at = self.arrived_at
        self.num_tokens = 0
        self._open = True
        metrics.open_requests.inc()

    def tokens(self, num_tokens: int) -> None:
        """They just arrived, together; the time since the last ones is spread over them."""
        now = time.monotonic()
        if num_tokens and self.first_at is None:
            self.first_at = now
            self._metrics.ttft.observe(now - self.arrived_at)
        elif num_tokens:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - self.last_at) / num_tokens)
        self.last_at = now
        self.num_tokens += num_tokens
        self._metrics.generated_tokens.inc(num_tokens)

    def end(self, outcome: Outcome) -> None:
        """The first call counts."""
        if not self._open:
            return
        self._open = False
        self._metrics.open_requests.dec()
        self._metrics.requests.labels(outcome).inc()
        if outcome is Outcome.OK:
            self._metrics.end_to_end.observe(time.monotonic() - self.arrived_at)

    @property
    def ttft_ms(self) -> float:
        return 1000 * ((self.first_at or self.last_at) - self.arrived_at)

    @property
    def itl_ms(self) -> float | None:
        if self.first_at is None or self.num_tokens < 2:
            return None
        return 1000 * (self.last_at - self.first_at) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`finish` comes with the last one."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None


class Completion:
    """`pieces` once; afterwards `usage` tells the rest. `detokenizer` is None where there is no tokenizer."""

    def __init__(
        self,
        router: Router,
        request: RouterRequest,
        tally: Tally,
        *,
        detokenizer: Detokenizer | None,
        stops: tuple[str, ...] = (),
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._router = router
        self.request = request
        self.tally = tally
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops)
        self._silent = eos_token_ids.union(request.sampling.stop_token_ids)  # no text, where they end the request
        self._num_tokens = 0
        self._last: TokenDelta | None = None
        self._route: pb.Route | None = None

    async def pieces(self) -> AsyncGenerator[Piece]:
        """At least one. Closing it early cancels the request. Raises the RequestError family."""
        async with aclosing(self._router.generate(self.request)) as deltas:
            async for delta in deltas:
                self._last, self._route = delta, delta.route
                self.tally.tokens(len(delta.token_ids))
                piece = self._piece(delta)
                if piece.text or piece.token_ids or piece.finish:
                    yield piece
                if piece.finish is not None:
                    return
        raise RequestError(f"request {self.request.request_id} ended without a finish reason; report its id")

    def usage(self, *, with_route: bool) -> Usage:
        num_prompt = len(self.request.prompt_token_ids)
        route = self._route
        cached = 0 if route is None else _hit_tokens(route)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_tokens,
            total_tokens=num_prompt + self._num_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
            sluice=self._report() if with_route and self._last else None,
        )

    def _piece(self, delta: TokenDelta) -> Piece:
        """The text of new tokens up to where a stop string begins, and the tokens up to the one that completed it."""
        text = ""
        for count, token_id in enumerate(delta.token_ids, 1):
            self._num_tokens += 1
            ends = delta.finish is FinishReason.STOP and count == len(delta.token_ids)
            if self._detokenizer is None or (ends and token_id in self._silent):
                continue
            new = self._detokenizer.push(token_id)
            if self._num_tokens < self.request.sampling.min_tokens:
                text += self._finder.flush() + new
                continue
            shown, stop = self._finder.push(new)
            text += shown
            if stop is not None:
                return Piece(text=text, token_ids=delta.token_ids[:count], finish="stop")
        if delta.finish is not None and self._detokenizer is not None:
            shown, stop = self._finder.push(self._detokenizer.flush())
            text += shown + self._finder.flush()
        finish: Finish | None = None
        if delta.finish is not None:
            finish = "stop" if delta.finish is FinishReason.STOP else "length"
        return Piece(text=text, token_ids=delta.token_ids, finish=finish)

    def _report(self) -> RouteReport:
        """Without the worker's own report (a stop string ended the request here) it says what was planned."""
        assert self._last is not None
        plan, route = self._last.plan, self._route or _planned(self._last.plan)
        prefill = None
        if route.HasField("prefill"):
            prefill = WorkerRoute(name=route.prefill.name, incarnation=route.prefill.incarnation, pid=route.prefill_pid)
        return RouteReport(
            request_id=self.request.request_id,
            plan="aggregated" if _is_local(plan) else "disaggregated",
            attempts=self._last.attempt,
            prefill=prefill,
            decode=WorkerRoute(name=route.decode.name, incarnation=route.decode.incarnation, pid=route.decode_pid),
            transport=route.transport,
            prompt_tokens=len(self.request.prompt_token_ids),
            prefix_hit_tokens=_hit_tokens(route),
            decode_prefix_hit_tokens=route.decode_prefix_hit_tokens,
            prefill_prefix_hit_tokens=route.prefill_prefix_hit_tokens,
            chunks=route.chunks,
            blocks=route.blocks,
            bytes=route.bytes,
            transfer_s=route.transfer_s,
            gb_per_s=route.bytes / route.transfer_s / 1e9 if route.transfer_s > 0 else 0.0,
            local_prefill=route.local_prefill,
            recomputed_tokens=route.recomputed_tokens,
            preemptions=route.preemptions,
            spare_used=bool(route.spare_used),
            queue_s=route.queue_s,
            prefill_s=route.prefill_s,
            ttft_ms=self.tally.ttft_ms,
            itl_ms=self.tally.itl_ms,
        )


def _planned(plan: Plan) -> pb.Route:
    route = pb.Route(decode=plan.decode.ref, decode_pid=plan.decode.pid, local_prefill=_is_local(plan))
    if not _is_local(plan):
        route.prefill.CopyFrom(plan.prefill.ref)
        route.prefill_pid = plan.prefill.pid
    return route


def _is_local(plan: Plan) -> bool:
    return plan.prefill.incarnation == plan.decode.incarnation


def _hit_tokens(route: pb.Route) -> int:
    """Both caches begin at the first token: the longer hit covers the other."""
    return max(route.decode_prefix_hit_tokens, route.prefill_prefix_hit_tokens)
