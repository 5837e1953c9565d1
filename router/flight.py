"""One request in flight: its attempts, what its client got, and why it ends.

    PLACING ──place──▶ RUNNING ──finish──────────────▶ ENDED
       ▲                  │                              ▲
       └──fail_attempt────┘  (next attempt, with what    │
       │                      was emitted as known input)│
       └───────── error, deadline, cancel ───────────────┘   from either state, once

Tokens are taken in order, each index once, whatever attempts repeat or leave out. Belongs to one thread, that of
the router's event loop; nothing here knows sessions or clocks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from cluster.errors import Busy, RequestError, WorkerFailed, from_failure
from cluster.hashing import HASH_BYTES, block_hashes, chain_root
from cluster.hidden_states import HiddenStates
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, Hypothesis, RequestKey, SamplingParams, TokenLogprobs
from router.journal import Journal
from router.output import Output
from router.plan import NoPlan, Plan

MAX_UNREAD_TOKENS = 16_384
MAX_DEATHS = 2  # of different workers, under one request: it is poisoned
PROVEN_TOKENS = 32  # that it emits after a death: whatever killed the worker, it was not this request

# Failures after which another worker may do better.
_ELSEWHERE = frozenset(
    {pb.BUSY, pb.DRAINING, pb.NO_WORKER, pb.PEER_LOST, pb.INTERNAL, pb.INCOMPATIBLE, pb.STALE, pb.ERROR_UNSPECIFIED}
)
_DEADLY = frozenset({pb.PEER_LOST, pb.INTERNAL})
_PASSING = frozenset({pb.PEER_LOST, pb.NO_WORKER})  # the same worker may do, too, if there is no other


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRequest:
    """What the router is asked to do. `request_id` is unique among the requests of all ingresses."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    encoder_token_ids: tuple[int, ...] = ()  # what the encoder reads; the prompt is the decoder's then
    priority: int = 0  # larger first
    deadline_s: float | None = None  # remaining; None: none
    leader_id: str = ""  # an open request with the same prompt: this one is placed beside it and shares its blocks
    session: str = ""  # what the client calls the session that it belongs to; "": none
    client: str = ""  # whose share of the replica it is part of; "": everybody without a name
    weight: int = 1  # of that share
    cache_salt: str = ""  # it meets cached blocks of the same salt only
    journal: Journal | None = field(default=None, compare=False)  # of a request that is traced


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New tokens of a request. `finish` comes with the last ones, which may be none, and so does `route`."""

    token_ids: tuple[int, ...]
    first_index: int  # among the emitted tokens of the request
    finish: FinishReason | None
    route: pb.Route | None
    plan: Plan  # of the attempt that runs now
    attempt: int  # 1: the first
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, where sampling.num_logprobs asks
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # all of them, of prompt tokens 1 …, with the first token
    embedding: tuple[float, ...] = ()  # where sampling.pooling asks; comes with the finish, and no tokens
    hypotheses: tuple[Hypothesis, ...] = ()  # where sampling.beams asks, best first; as the embedding
    states: HiddenStates | None = None  # where sampling.pooling asks for them; as the embedding


class State(Enum):
    PLACING = auto()
    RUNNING = auto()
    ENDED = auto()


class Receipt(Enum):
    """What became of the tokens in a frame."""

    TAKEN = auto()
    REPEATED = auto()  # all of them were known already
    OLD_ATTEMPT = auto()
    GAP = auto()  # the attempt left some out: it cannot be trusted
    FAILED = auto()  # the worker reports a failure
    UNREAD = auto()  # the client does not take its tokens: the request must end


class Flight:
    def __init__(self, request: RouterRequest) -> None:
        self.request = request
        self.state = State.PLACING
        self.attempt = 0
        self.output = Output(len(request.prompt_token_ids), request.sampling)
        self.plan: Plan | None = None
        self.session_id = ""  # of the running attempt
        self.excluded: set[str] = set()  # incarnations that turned it away or failed it, and live
        self.shunned: set[str] = set()  # incarnations that were lost, or lost a source: chosen if there is no other
        self.last_failure: pb.Failure | None = None
        self.error: RequestError | None = None
        self.finish: FinishReason | None = None
        self.route: pb.Route | None = None
        self.suspects: set[str] = set()  # incarnations whose session broke under it: they may be dead, and of it
        self.in_company = False  # the last worker that it lost was lost by others, too
        self.on_trial = False
        self.is_convicted = False
        self._deaths: set[str] = set()
        self._died_at = 0  # tokens emitted by then
        self._num_moved = 0  # attempts that do not count: their worker leaves or lives, or much was emitted since
        self._heard_of: set[str] = set()  # incarnations that live, though their session broke under it
        self._num_taken = 0  # tokens handed to the client
        self._finish_taken = False
        self._held: pb.SequenceTokens | None = None  # the last frame of the attempt, ahead of its hidden states
        self._news = asyncio.Event()
        self._roots: dict[bytes, bytes] = {}  # by compatibility hash
        self._hashes: dict[bytes, bytes] = {}  # by root of the chain

    @property
    def emitted(self) -> list[int]:
        """The tokens so far, over all attempts."""
        return self.output.token_ids

    @property
    def is_replay(self) -> bool:
        """Whether the running attempt follows one that had begun, not one that was turned away."""
        if self.last_failure is None or self.last_failure.code in (pb.BUSY, pb.NO_WORKER):
            return False
        return self.last_failure.code != pb.DRAINING or bool(self.emitted)

    @property
    def is_suspected(self) -> bool:
        """Whether so many workers were lost or failed under it that it may be what they die of."""
        return len(self._deaths | self.suspects) >= MAX_DEATHS

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.request.request_id, self.attempt)

    # ------------------------------------------------------------ attempts

    def place(self, plan: Plan, session_id: str) -> RequestKey:
        """PLACING -> RUNNING, the next attempt; its key."""
        assert self.state is State.PLACING, self.state
        self.state = State.RUNNING
        self.attempt += 1
        self.plan = plan
        self.session_id = session_id
        self._held = None
        return self.key

    @property
    def num_tokens(self) -> int:
        """That have or need KV: of the prompt and emitted."""
        return len(self.request.prompt_token_ids) + len(self.emitted)

    def root(self, compatibility_hash: bytes) -> bytes | None:
        """Of its hash chain on workers with that model; None: that of the model itself."""
        request = self.request
        if not request.cache_salt and not request.encoder_token_ids:
            return None
        if compatibility_hash not in self._roots:
            self._roots[compatibility_hash] = chain_root(
                compatibility_hash, salt=request.cache_salt, encoder_tokens=request.encoder_token_ids
            )
        return self._roots[compatibility_hash]

    def hashes(self, root: bytes, block_size: int) -> bytes:
        """Of the full blocks so far, one after the other; the same object as long as they are the same. A chain is
        computed once and grows with what was emitted."""
        hashes = self._hashes.get(root, b"")
        start = len(hashes) // HASH_BYTES * block_size
        if self.num_tokens - start >= block_size:
            known = [*self.request.prompt_token_ids, *self.emitted]
            more = block_hashes(root, known[start:], block_size, hashes[-HASH_BYTES:] or None)
            hashes = self._hashes[root] = hashes + b"".join(more)
        return hashes

    def submit(self, root: bytes, block_size: int, deadline_ms: int, *, sibling: str = "") -> pb.Submit:
        """The words for the running attempt. `sibling`: a request there with the same prompt, whose blocks it shares
        if it has no leader of its own."""
        assert self.plan is not None
        request = self.request
        sampling = request.sampling
        if self.output.has_prompt_logprobs:
            sampling = replace(sampling, num_prompt_logprobs=None)
        return pb.Submit(
            key=self.key.wire(),
            plan=self.plan.wire(),
            prompt_token_ids=request.prompt_token_ids,
            emitted_token_ids=self.emitted,
            sampling=sampling.wire(),
            priority=request.priority,
            deadline_ms=deadline_ms,
            block_hashes=self.hashes(root, block_size),
            shard=self.plan.decode.shard,
            leader_id=request.leader_id or sibling,
            chain_root=root if request.cache_salt or request.encoder_token_ids else b"",
            encoder_token_ids=request.encoder_token_ids,
            traceparent="" if request.journal is None else request.journal.traceparent,
        )

    def receive(self, session_id: str, tokens: pb.SequenceTokens) -> Receipt:
        """Takes what is new of a frame; its finish ends the flight. After FAILED, GAP and UNREAD the caller acts."""
        if self.state is not State.RUNNING or session_id != self.session_id or tokens.key.attempt != self.attempt:
            return Receipt.OLD_ATTEMPT
        if self.output.lacks_states and tokens.finish in (pb.STOP, pb.LENGTH):
            self._held = tokens
            return Receipt.TAKEN
        num_new = self.output.take(tokens)
        if self.request.journal is not None:
            self.request.journal.heard(tokens, num_new or 0)
        if num_new is None:
            return Receipt.GAP
        if num_new:
            self._news.set()
            if (self._deaths or self.suspects) and len(self.emitted) - self._died_at >= PROVEN_TOKENS:
                self._acquit()
        if tokens.finish == pb.ERROR:
            return Receipt.FAILED
        if tokens.finish != pb.FINISH_UNSPECIFIED:
            self._complete(FinishReason(tokens.finish), tokens.route if tokens.HasField("route") else None)
        elif len(self.emitted) - self._num_taken > MAX_UNREAD_TOKENS:
            return Receipt.UNREAD
        return Receipt.REPEATED if tokens.token_ids and not num_new else Receipt.TAKEN

    def bring(self, session_id: str, attempt: int, states: HiddenStates) -> bool:
        """Takes hidden states, and the last frame that waits for them. False: not those of the running attempt, or of
        another number of tokens than were sent."""
        if self.state is not State.RUNNING or session_id != self.session_id or attempt != self.attempt:
            return False
        if not self.output.lacks_states or states.num_tokens != len(self.request.encoder_token_ids):
            return False
        self.output.states = states
        if self._held is not None:
            self.receive(session_id, self._held)
        return True

    def fail_attempt(
        self, failure: pb.Failure, max_attempts: int, *, reported: bool, blamed: bool = True, in_company: bool = False
    ) -> bool:
        """RUNNING -> PLACING, True: try elsewhere, once it is not suspected. Or -> ENDED, False: it is over.

        `reported`: the decode worker lives and said so itself; PEER_LOST then means that two sources died under it.
        `blamed`: it may be what a worker died of, or, `in_company`, one of the others that were lost with it.
        """
        assert self.state is State.RUNNING and self.plan is not None, self.state
        self.last_failure = failure
        decode = self.plan.decode.incarnation
        sampling = self.request.sampling
        if failure.code not in _ELSEWHERE:
            self.end(from_failure(failure))
        elif (
            sampling.pooling is None and len(self.emitted) >= sampling.max_tokens
        ):  # nothing is missing but the word that it is over
            self._complete(FinishReason.LENGTH, None)
        elif self.emitted and self._is_stop(self.emitted[-1]):
            self._complete(FinishReason.STOP, None)
        else:
            self._num_moved += failure.code == pb.DRAINING
            if failure.code in _DEADLY and blamed:
                (self.suspects if failure.code == pb.PEER_LOST else self._deaths).add(decode)
                self._died_at, self.in_company = len(self.emitted), in_company
                self.is_convicted |= self.on_trial
            passing = failure.code in _PASSING or in_company
            (self.shunned if passing else self.excluded).add(decode)
            sources_died = reported and failure.code == pb.PEER_LOST
            tried = self.is_convicted or not self.in_company
            if sources_died or (len(self._deaths) >= MAX_DEATHS and tried):
                self.end(self.poisonous())
            elif self.attempt - self._num_moved >= max_attempts and not self.is_suspected:
                self.end(self.last_error())
            else:
                self.state = State.PLACING
        return self.state is State.PLACING

    def heard_of(self, incarnation: str) -> None:
        """The worker lives: it did not die of this. Once for each worker, a session that broke is no attempt, as all of
        them break under an ingress that was frozen; not more often, lest it break them for ever."""
        if incarnation in self.suspects:
            self.suspects.discard(incarnation)
            self._num_moved += incarnation not in self._heard_of
            self._heard_of.add(incarnation)

    def begin_trial(self) -> None:
        """Where it was turned away in company it may go again."""
        self.on_trial, self.is_convicted = True, False
        self.excluded.clear()

    def poisonous(self) -> WorkerFailed:
        """What the client is told when workers die of it."""
        last = self.last_failure.message if self.last_failure else ""
        return WorkerFailed(
            f"request {self.request.request_id} failed on {max(MAX_DEATHS, len(self._deaths | self.suspects))} workers "
            f"and is not tried again (last: {last}); report its id"
        )

    def last_error(self, unplaced: NoPlan | None = None) -> RequestError:
        """What the client is told when no further attempt is made."""
        failure = self.last_failure
        assert failure is not None
        detail = failure.message or (unplaced.reason if unplaced else "")
        if failure.code == pb.BUSY:
            return Busy(f"every worker's queue is full; retry later ({detail})")
        error = from_failure(failure)
        tried = f"request {self.request.request_id} failed after {self.attempt} attempts: {detail}"
        return type(error)(tried)

    def end(self, error: RequestError) -> None:
        """-> ENDED. The client gets what was emitted, then the error. The first end counts."""
        if self.state is not State.ENDED:
            self.state = State.ENDED
            self.error = error
            self._news.set()

    # ------------------------------------------------------------ the client's side

    def take(self) -> TokenDelta | None:
        """What is new for the client; None: nothing yet, or nothing any more."""
        whole = self.finish is not None and not self._finish_taken
        if len(self.emitted) == self._num_taken and not whole:
            return None
        assert self.plan is not None
        output = self.output
        first, self._num_taken, self._finish_taken = self._num_taken, len(self.emitted), self.finish is not None
        return TokenDelta(
            token_ids=tuple(self.emitted[first:]),
            first_index=first,
            finish=self.finish,
            route=self.route,
            plan=self.plan,
            attempt=self.attempt,
            logprobs=tuple(output.logprobs[first:]),
            prompt_logprobs=() if first else tuple(output.prompt_logprobs),
            embedding=output.embedding,
            hypotheses=output.hypotheses,
            states=output.states,
        )

    async def news(self) -> None:
        """Returns when something may have happened since the last call."""
        await self._news.wait()
        self._news.clear()

    # ------------------------------------------------------------ inside

    def _complete(self, finish: FinishReason, route: pb.Route | None) -> None:
        self.state = State.ENDED
        self.finish = finish
        self.route = route
        self._news.set()

    def _acquit(self) -> None:
        self._deaths.clear()
        self.suspects.clear()
        self.in_company = self.on_trial = self.is_convicted = False
        self._num_moved = self.attempt - 1

    def _is_stop(self, token: int) -> bool:
        sampling = self.request.sampling
        return token in sampling.stop_token_ids and len(self.emitted) >= sampling.min_tokens
