"""A worker whose steps and reads take no work, only virtual time. Scheduler, block manager, block log and rate are
those of real workers, and so are the words with the router; the way of a prompt between two workers is told in short.

    submit ─▶ reserved ─▶ asked ──tickets──▶ reading ──last block──▶ running ─▶ finished
       └──── no room: again after RETRY_S          first token: told when the last ticket comes

Nothing fails here: there are no spares, deadlines, cancels or stale reads, and queues have no limit of their own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Final

from benchmarks.simulator.account import Account
from benchmarks.simulator.cores import Cores
from benchmarks.simulator.fetching import Fetching, Link
from benchmarks.simulator.line import Ear, Line
from benchmarks.simulator.step_cost import StepCost
from cluster import hashing
from cluster.membership import Member
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, RequestKey, SamplingParams
from workers.block_log import BlockLog
from workers.engine.block_manager import BlockManager, GroupCapacity
from workers.engine.scheduler import Scheduler, SchedulerLimits
from workers.engine.sequence import Sequence, SequenceStatus
from workers.engine.step_plan import StepOutcome, StepPlan, StepResult

PUBLISH_S: Final = 0.05  # as workers/block_subscribers.py has it; reports come half as often
RETRY_S: Final = 0.05
TICK_S: Final = 0.01
_FIRST_ANSWER_TOKEN: Final = 1 << 31  # no prompt has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all workers of a pool have in common."""

    cost: StepCost
    num_blocks: int
    block_size: int
    limits: SchedulerLimits


@dataclass(slots=True, eq=False)
class _Request:
    """Here for decode."""

    key: RequestKey
    sequence: Sequence
    source: str  # incarnation; that of this worker: the prompt is computed here
    holding: pb.Holding  # of the worker that computes it
    asked_tokens: int = 0
    num_reads: int = 0  # on their way
    has_last_ticket: bool = False
    route: pb.Route = field(default_factory=pb.Route)


@dataclass(slots=True, eq=False)
class _Prompt:
    """Here for a sink."""

    request: _Request
    sink: SimulatedWorker
    sequence: Sequence
    next_block: int
    leased: list[tuple[int, int]]
    accepted_at: float
    has_begun: bool = False
    fetched_blocks: int = 0


class SimulatedWorker:
    """`peers`: all workers by incarnation, this one included as long as it lives."""

    def __init__(
        self,
        member: Member,
        shape: Shape,
        cores: Cores,
        peers: dict[str, SimulatedWorker],
        fetchings: dict[str, Fetching],
        router: Ear,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.member = member
        self.shape = shape
        self.line = Line(self.hear, member)
        self.draining = False
        self.blocks = BlockManager([GroupCapacity("self", shape.num_blocks, shape.block_size)])
        self.scheduler = Scheduler(self.blocks, shape.limits, hashing.chain_root(member.compatibility_hash))
        self.account = Account(shape.limits.max_sequences, loop.time())
        self._cost = shape.cost
        self._cores = cores
        self._peers = peers
        self._router = router
        self._loop = loop
        self._link = Link(shape.cost, loop)
        self._fetching = Fetching(
            self.scheduler,
            self.blocks,
            shape.block_size,
            self._link,
            fetchings,
            self._after_words,
            self._post,
        )
        fetchings[member.incarnation] = self._fetching
        self._log = BlockLog(self.blocks)
        self._ids = count(1)
        self._requests: dict[int, _Request] = {}  # by id of the sequence
        self._prompts: dict[int, _Prompt] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._in_step = False
        self._woken = False
        self._num_pending = 0
        self._has_news = True  # for the next report
        self._is_telling = True
        self._num_told = 0

    # ------------------------------------------------------------ words

    def start(self) -> None:
        """Reports and publishes from now on, as long as it is among its peers."""
        self._tell_news()

    def hear(self, frame: pb.Frame) -> None:
        match frame.WhichOneof("kind"):
            case "submit":
                self._after_words(partial(self._submit, frame.submit))
            case "block_query":
                for events in self._log.after(frame.block_query.last_id):
                    self._say_bulk(events)
            case kind:
                raise ValueError(f"a simulated worker takes no {kind}")

    @property
    def num_open(self) -> int:
        return len(self._requests) + len(self._prompts) + self._fetching.num_open

    @property
    def sources(self) -> set[str]:
        """Whom the requests here have asked, or will."""
        return {request.source for request in self._requests.values()}

    def _tell_news(self) -> None:
        """Events every PUBLISH_S, a report every second time. Nothing where nothing has changed since the last ones."""
        if self.member.incarnation not in self._peers:
            return
        self._num_told += 1
        events = self._log.collect()
        if events is not None:
            self._say_bulk(events)
        if self._num_told % 2:
            self._is_telling = bool(self.num_open) or self._has_news
            if self._is_telling:
                self._has_news = False
                self._say(pb.Frame(load_report=self.report()))
        if self._is_telling:
            self._loop.call_later(PUBLISH_S, self._tell_news)

    def _after_words(self, call: Callable[[], None]) -> None:
        """On this worker's engine thread, one frame's way later."""
        self._loop.call_later(self._cost.words, self._post, call)

    def _say(self, frame: pb.Frame) -> None:
        self._loop.call_later(self._cost.words, self._router.heard, self.line, frame)

    def _say_bulk(self, events: pb.BlockEvents) -> None:
        self._loop.call_later(self._cost.words, self._router.heard_blocks, self.line, events)

    def report(self) -> pb.LoadReport:
        counts = self.blocks.counts(0)._asdict()
        return pb.LoadReport(
            num_waiting=self.scheduler.num_waiting + self._num_pending,
            num_running=self.scheduler.num_running,
            num_pulling=self.scheduler.num_pulling,
            queued_prefill_tokens=self.scheduler.queued_prefill_tokens,
            groups=[pb.GroupLoad(name="self", num_blocks=self.shape.num_blocks, **counts)],
            draining=self.draining,
            pairs=[
                pb.PairReport(source_incarnation=each, warm=True, bytes_per_s=self._cost.bytes_per_s)
                for each in self._peers
                if each != self.member.incarnation
            ],
            last_event_id=self._log.last_id,
            block_bytes=self._cost.block_bytes,
            prefill_tokens_per_s=self.account.rate.per_s,
        )

    # ------------------------------------------------------------ decode

    def _submit(self, submit: pb.Submit) -> None:
        key = RequestKey.of(submit.key)
        tokens = [*submit.prompt_token_ids, *submit.emitted_token_ids]
        params = SamplingParams(max_tokens=submit.sampling.max_tokens, ignore_eos=True)
        number = next(self._ids)
        sequence = Sequence(
            number,
            key,
            tokens,
            len(submit.prompt_token_ids),
            params,
            arrival=number,
            hashes=hashing.split(submit.block_hashes),
            chain_root=submit.chain_root or None,
        )
        self.scheduler.check(sequence)
        (stage,) = [stage for stage in submit.plan.stages if stage.stage == pb.PREFILL]
        source = stage.worker.incarnation
        request = self._requests[number] = _Request(key, sequence, source, stage.holding)
        request.route.local_prefill = source == self.member.incarnation
        if source == self.member.incarnation:
            self._compute(sequence, stage.holding)
        else:
            self._num_pending += 1
            self._pull(request)

    def _compute(self, sequence: Sequence, holding: pb.Holding) -> None:
        if not self._fetching.begin(sequence, holding):
            self.scheduler.add(sequence)

    def _pull(self, request: _Request) -> None:
        sequence, source = request.sequence, self._peers[request.source]
        reservation = self.scheduler.reserve_for_pull(sequence)
        if reservation is None:
            self._loop.call_later(RETRY_S, self._post, partial(self._pull, request))
            return
        self._num_pending -= 1
        request.route.decode_prefix_hit_tokens = reservation.hit_tokens
        request.asked_tokens = len(sequence.tokens)
        source._after_words(partial(source._ask, self, request, reservation.first_block))

    def _ticket(self, request: _Request, prompt: _Prompt, num_blocks: int, token: int | None) -> None:
        """Blocks may be read; the last ticket brings the first token."""
        if num_blocks:
            request.num_reads += 1
            self._link.read(num_blocks, self._post, partial(self._read, request, prompt))
        if token is not None:
            request.has_last_ticket = True
            request.route.prefill_prefix_hit_tokens = prompt.sequence.prefix_hit_tokens
            request.route.fetched.blocks = prompt.fetched_blocks
            finish = self.scheduler.append_token(request.sequence, token)
            self._tell([(request, token, finish)])
            if finish is not None:
                self.scheduler.abort(request.sequence)
                self._requests.pop(request.sequence.id)
        self._advance(request, prompt)

    def _read(self, request: _Request, prompt: _Prompt) -> None:
        request.num_reads -= 1
        self._advance(request, prompt)

    def _advance(self, request: _Request, prompt: _Prompt) -> None:
        if request.num_reads or not request.has_last_ticket:
            return
        source = self._peers[request.source]
        source._after_words(partial(source._release, prompt))
        if request.sequence.status is SequenceStatus.PULLING:
            self.scheduler.pull_done(request.sequence, request.asked_tokens)

    def _tell(self, tokens: list[tuple[_Request, int, FinishReason | None]]) -> None:
        """One frame, of one step."""
        frame = pb.Frame(step_tokens=pb.StepTokens())
        for request, token, finish in tokens:
            told = frame.step_tokens.sequences.add(
                key=request.key.wire(), first_token_index=request.sequence.num_emitted - 1, token_ids=[token]
            )
            if finish is not None:
                told.finish = finish.value
                told.route.CopyFrom(request.route)
        self._say(frame)

    # ------------------------------------------------------------ prefill

    def _ask(self, sink: SimulatedWorker, request: _Request, first_block: int) -> None:
        number, asked = next(self._ids), request.sequence
        sequence = Sequence(
            number,
            request.key,
            list(asked.tokens),
            asked.num_prompt,
            asked.params,
            arrival=number,
            hashes=asked.hashes,
            chain_root=asked.chain_root,
            stop_after_first=True,
        )
        self._prompts[number] = _Prompt(request, sink, sequence, first_block, [], self._loop.time())
        self._compute(sequence, request.holding)

    def _release(self, prompt: _Prompt) -> None:
        self.blocks.unpin(prompt.leased)
        del self._prompts[prompt.sequence.id]

    def _lease(self, prompt: _Prompt, num_confirmed: int, token: int | None) -> None:
        if not prompt.has_begun:
            prompt.has_begun = True
            self.account.began(self._loop.time() - prompt.accepted_at)
        size = self.shape.block_size
        end = num_confirmed // size if token is None else -(-num_confirmed // size)
        new = [(0, block) for block in prompt.sequence.block_tables[0][prompt.next_block : end]]
        if not new and token is None:
            return
        prompt.fetched_blocks += self._fetching.take_fetched(prompt.sequence)
        self.blocks.pin(new)
        prompt.leased += new
        prompt.next_block = max(prompt.next_block, end)
        prompt.sink._after_words(partial(prompt.sink._ticket, prompt.request, prompt, len(new), token))

    # ------------------------------------------------------------ the engine

    def _post(self, call: Callable[[], None]) -> None:
        """Between two steps."""
        self._inbox.append(call)
        if not self._in_step:
            self._turn()

    def _turn(self) -> None:
        self._has_news = True
        if not self._is_telling:
            self._is_telling = True
            self._loop.call_later(PUBLISH_S, self._tell_news)
        while self._inbox:
            self._inbox.popleft()()
        if not self.scheduler.has_work:
            return
        plan = self.scheduler.schedule()
        if plan.sequences:
            self._in_step = True
            seconds = self._cost.step_s(plan.sequences)
            self._cores.compute(seconds, partial(self._end_step, plan, self._loop.time()))
            return
        self._settle(self.scheduler.settle(plan, StepResult()))
        if self.scheduler.has_work and not self._woken:  # for room that others hold: it looks again at the next tick
            self._woken = True
            self._loop.call_later(TICK_S, self._look_again)

    def _look_again(self) -> None:
        self._woken = False
        if not self._in_step:
            self._turn()

    def _end_step(self, plan: StepPlan, begun_at: float) -> None:
        tokens = {row.id: _FIRST_ANSWER_TOKEN + row.id for row in plan.sequences if row.sample}
        self.account.stepped(plan, self._loop.time() - begun_at)
        self._in_step = False
        self._settle(self.scheduler.settle(plan, StepResult(tokens=tokens)))
        self._turn()

    def _settle(self, outcome: StepOutcome) -> None:
        first = {sampled.seq.id: sampled.token for sampled in outcome.tokens}
        for chunk in outcome.chunks:
            prompt = self._prompts.get(chunk.seq.id)
            if prompt is not None:
                self._lease(prompt, chunk.num_confirmed, first.get(chunk.seq.id))
        told = [
            (request, sampled.token, sampled.finish)
            for sampled in outcome.tokens
            if (request := self._requests.get(sampled.seq.id)) is not None
        ]
        for request, _, finish in told:
            if request.route.local_prefill:
                request.route.decode_prefix_hit_tokens = request.sequence.prefix_hit_tokens
                request.route.fetched.blocks += self._fetching.take_fetched(request.sequence)
            if finish is not None:
                del self._requests[request.sequence.id]
        if told:
            self._tell(told)
