"""One completion as its client sees it: tokens of the router turned into text, cut at stop strings, and measured."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.errors import RequestError
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, TokenLogprobs
from deploy.openai_answers import Finish, RouteReport, WorkerRoute
from deploy.stream import Detokenizer, StopFinder
from deploy.tally import Pace, Tally
from router.flight import RouterRequest, TokenDelta
from router.plan import Plan
from router.router import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`finish` comes with the last one. `logprobs` and `offsets` are told where logprobs are asked for."""

    index: int = 0
    """Of the choice."""
    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()
    """Where each token's text begins in the whole text, in characters."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of prompt tokens 1 …; with the first piece."""
    score: float | None = None
    """Of a text that a search found: sum of its logprobs, by its length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What ends a text, and what is shown of it."""

    stops: tuple[str, ...] = ()
    show_stop: bool = False
    """The stop string that was found is part of the text."""
    eos_token_ids: frozenset[int] = frozenset()
    wants_tokens: bool = True
    """False: only the prompt is looked at; the one token that a worker must emit is dropped."""


class Completion:
    """`pieces` once; afterwards `usage` tells the rest. `detokenizer` is None where there is no tokenizer."""

    def __init__(
        self,
        router: Router,
        request: RouterRequest,
        tally: Tally,
        *,
        detokenizer: Detokenizer | None,
        ending: Ending,
    ) -> None:
        self._router = router
        self.request = request
        self.tally = tally
        self._pace = Pace()
        self._detokenizer = detokenizer
        self._ending = ending
        self._finder = StopFinder(ending.stops)
        self._silent = ending.eos_token_ids.union(request.sampling.stop_token_ids)  # no text, where they end it
        self._with_logprobs = request.sampling.num_logprobs is not None
        self._num_tokens = 0
        self._last: TokenDelta | None = None
        self._route: pb.Route | None = None

    async def pieces(self) -> AsyncGenerator[Piece]:
        """At least one. Closing it early cancels the request. Raises the RequestError family."""
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        async with aclosing(self._router.generate(self.request)) as deltas:
            async for delta in deltas:
                self._last, self._route = delta, delta.route
                prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
                if not self._ending.wants_tokens:
                    yield Piece(text="", token_ids=(), finish="length", prompt_logprobs=prompt_logprobs)
                    return
                self.tally.tokens(len(delta.token_ids), self._pace)
                piece = self._piece(delta)
                if piece.text or piece.token_ids or piece.finish:
                    yield replace(piece, prompt_logprobs=prompt_logprobs) if prompt_logprobs else piece
                    prompt_logprobs = ()
                if piece.finish is not None:
                    return
        raise RequestError(f"request {self.request.request_id} ended without a finish reason; report its id")

    @property
    def num_tokens(self) -> int:
        """Emitted, up to the one that completed a stop string."""
        return self._num_tokens

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, found in caches."""
        return 0 if self._route is None else _hit_tokens(self._route)

    def _piece(self, delta: TokenDelta) -> Piece:
        """The text of new tokens up to where a stop string begins, and the tokens up to the one that completed it."""
        text = ""
        offsets: list[int] = []
        for count, token_id in enumerate(delta.token_ids, 1):
            self._num_tokens += 1
            ends = delta.finish is FinishReason.STOP and count == len(delta.token_ids)
            offsets.append(0 if self._detokenizer is None else self._detokenizer.num_chars)
            if self._detokenizer is None or (ends and token_id in self._silent):
                continue
            new = self._detokenizer.push(token_id)
            if self._num_tokens < self.request.sampling.min_tokens:
                text += self._finder.flush() + new
                continue
            shown, stop = self._finder.push(new)
            text += shown
            if stop is not None:
                return self._with(delta, offsets, text + self._shown(stop), "stop")
        stop = None
        if delta.finish is not None and self._detokenizer is not None:
            shown, stop = self._finder.push(self._detokenizer.flush())
            text += shown + (self._finder.flush() if stop is None else self._shown(stop))
        finish: Finish | None = None
        if delta.finish is not None:
            finish = "stop" if stop is not None or delta.finish is FinishReason.STOP else "length"
        return self._with(delta, offsets, text, finish)

    def _shown(self, stop: str) -> str:
        return stop if self._ending.show_stop else ""

    def _with(self, delta: TokenDelta, offsets: list[int], text: str, finish: Finish | None) -> Piece:
        """As many tokens, logprobs and offsets as `offsets` has."""
        token_ids = delta.token_ids[: len(offsets)]
        if not self._with_logprobs:
            return Piece(text=text, token_ids=token_ids, finish=finish)
        logprobs = delta.logprobs[: len(offsets)]
        if len(logprobs) != len(token_ids):
            told = f"{len(delta.logprobs)} logprobs with {len(delta.token_ids)} tokens"
            raise RequestError(f"request {self.request.request_id} was answered with {told}; report its id")
        return Piece(text=text, token_ids=token_ids, finish=finish, logprobs=logprobs, offsets=tuple(offsets))

    def report(self) -> RouteReport | None:
        """None while nothing came."""
        return None if self._last is None else self._report()

    def _report(self) -> RouteReport:
        """Without the worker's own report (a stop string ended the request here) it says what was planned."""
        assert self._last is not None
        plan, route = self._last.plan, self._route or _planned(self._last.plan)
        prefill = None
        if route.HasField("prefill"):
            prefill = WorkerRoute(name=route.prefill.name, incarnation=route.prefill.incarnation, pid=route.prefill_pid)
        return RouteReport(
            request_id=self.request.request_id,
            plan="disaggregated" if _is_apart(plan) else "aggregated",
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
            skipped_blocks=route.skipped_blocks,
            encoded_by=route.encoded.encode.name or None,
            encoder_tokens=route.encoded.tokens,
            encoded_blocks=route.encoded.blocks,
            encoded_bytes=route.encoded.bytes,
            encode_ms=1000 * route.encoded.seconds,
            fetched_from=route.fetched.holder.name or None,
            fetched_blocks=route.fetched.blocks,
            fetched_bytes=route.fetched.bytes,
            fetch_ms=1000 * route.fetched.seconds,
            transfer_ms=1000 * route.transfer_s,
            gb_per_s=route.bytes / route.transfer_s / 1e9 if route.transfer_s > 0 else 0.0,
            local_prefill=route.local_prefill,
            recomputed_tokens=route.recomputed_tokens,
            preemptions=route.preemptions,
            spare_used=bool(route.spare_used),
            queue_ms=1000 * route.queue_s,
            prefill_ms=1000 * route.prefill_s,
            ttft_ms=self.tally.ttft_ms(self._pace),
            itl_ms=self._pace.itl_ms,
        )


def _planned(plan: Plan) -> pb.Route:
    route = pb.Route(decode=plan.decode.ref, decode_pid=plan.decode.pid, local_prefill=_is_local(plan))
    if not _is_local(plan):
        route.prefill.CopyFrom(plan.prefill.ref)
        route.prefill_pid = plan.prefill.pid
    return route


def _is_local(plan: Plan) -> bool:
    return plan.prefill.incarnation == plan.decode.incarnation


def _is_apart(plan: Plan) -> bool:
    """Whether more than one worker was to work on it."""
    encodes_elsewhere = plan.encode is not None and plan.encode.incarnation != plan.decode.incarnation
    return encodes_elsewhere or not _is_local(plan)


def _hit_tokens(route: pb.Route) -> int:
    """All caches begin at the first token: the longer hit covers the other. What is fetched goes on from the hit of
    the worker that computes the prompt."""
    decode, prefill = route.decode_prefix_hit_tokens, route.prefill_prefix_hit_tokens
    computing = decode if route.local_prefill else prefill
    return max(decode, prefill, computing + route.fetched.tokens)
