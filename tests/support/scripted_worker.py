"""A worker on a real socket that answers every Submit as its script says. No engine, no blocks.

    worker = ScriptedWorker("decode-0", script=[Say(3), Die()])

A script is what the worker does with each attempt submitted to it, action by action; requests share it, and each
attempt starts it anew. Without a script it says all tokens and finishes. Tokens are a function of the prompt and
the index, so that every worker goes on where another stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4
from zlib import crc32

from cluster.config import Role
from cluster.errors import SessionError
from cluster.membership import Member, Membership, MemberState
from cluster.protos import worker_pb2 as pb
from cluster.request import Hypothesis, RequestKey
from cluster.rpc import WordsServer
from cluster.session import Session
from cluster.words_config import WordsConfig
from cluster.words_thread import WordsThread
from tests.support.words import SECRET
from workers.block_log import BlockLog
from workers.engine.block_manager import BlockManager, GroupCapacity

DEADLINE_S = 20.0
VOCABULARY = 1000
STAGES = {Role.ENCODE: pb.ENCODE, Role.PREFILL: pb.PREFILL, Role.DECODE: pb.DECODE}


def token_at(prompt: Sequence[int], index: int) -> int:
    """The token that any worker emits at `index`."""
    return crc32(f"{list(prompt)}:{index}".encode()) % VOCABULARY


def all_tokens(prompt: Sequence[int], count: int) -> list[int]:
    return [token_at(prompt, index) for index in range(count)]


@dataclass(eq=False)
class Attempt:
    """One Submit and the state of the answer to it."""

    worker: ScriptedWorker
    session: Session
    submit: pb.Submit
    index: int = 0  # of the next token
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tokens(self, first: int, count: int) -> list[int]:
        told = self.worker.text
        if told is not None:
            return [told[index % len(told)] for index in range(first, first + count)]
        return [token_at(self.submit.prompt_token_ids, index) for index in range(first, first + count)]

    def send(
        self,
        first: int,
        token_ids: Iterable[int],
        *,
        finish: pb.FinishReason = pb.FINISH_UNSPECIFIED,
        attempt: int | None = None,
        failure: pb.Failure | None = None,
        found: Iterable[pb.Hypothesis] = (),
    ) -> None:
        key = pb.RequestKey(request_id=self.submit.key.request_id, attempt=self.submit.key.attempt)
        if attempt is not None:
            key.attempt = attempt
        tokens = pb.SequenceTokens(key=key, first_token_index=first, token_ids=token_ids, finish=finish)
        tokens.hypotheses.extend(found)
        if failure is not None:
            tokens.failure.CopyFrom(failure)
        if finish in (pb.STOP, pb.LENGTH):
            tokens.route.CopyFrom(self.worker.route(self.submit))
        self.session.send(pb.Frame(step_tokens=pb.StepTokens(sequences=[tokens])))


class Action(Protocol):
    def __call__(self, attempt: Attempt) -> bool:
        """Does it; False ends the script."""
        ...


@dataclass(frozen=True)
class Say:
    """The next tokens, in one frame each or all in one; finishes when max_tokens are out."""

    count: int = 1
    together: bool = False

    def __call__(self, attempt: Attempt) -> bool:
        left = attempt.submit.sampling.max_tokens - attempt.index
        count = min(self.count, left)
        sizes = [count] if self.together else [1] * count
        for size in sizes:
            first, attempt.index = attempt.index, attempt.index + size
            done = attempt.index >= attempt.submit.sampling.max_tokens
            attempt.send(first, attempt.tokens(first, size), finish=pb.LENGTH if done else pb.FINISH_UNSPECIFIED)
        return attempt.index < attempt.submit.sampling.max_tokens


@dataclass(frozen=True)
class Repeat:
    """The last tokens once more, as if they had not been said."""

    count: int = 1

    def __call__(self, attempt: Attempt) -> bool:
        first = max(0, attempt.index - self.count)
        attempt.send(first, attempt.tokens(first, attempt.index - first))
        return True


@dataclass(frozen=True)
class Older:
    """Tokens under the key of the attempt before, with wrong ids."""

    def __call__(self, attempt: Attempt) -> bool:
        attempt.send(attempt.index, [VOCABULARY + 1], attempt=attempt.submit.key.attempt - 1)
        return True


@dataclass(frozen=True)
class Skip:
    """Leaves tokens out."""

    count: int = 1

    def __call__(self, attempt: Attempt) -> bool:
        attempt.index = min(attempt.index + self.count, attempt.submit.sampling.max_tokens)
        return True


@dataclass(frozen=True)
class Fail:
    code: pb.ErrorCode
    message: str = "the script says so"

    def __call__(self, attempt: Attempt) -> bool:
        failure = pb.Failure(code=self.code, message=self.message)
        attempt.send(attempt.index, [], finish=pb.ERROR, failure=failure)
        return False


@dataclass(frozen=True)
class Stop:
    """The next tokens, the last of which says that it is over."""

    count: int = 0

    def __call__(self, attempt: Attempt) -> bool:
        attempt.send(attempt.index, attempt.tokens(attempt.index, self.count), finish=pb.STOP)
        return False


@dataclass(frozen=True)
class Find:
    """What a search finds."""

    hypotheses: tuple[Hypothesis, ...]

    def __call__(self, attempt: Attempt) -> bool:
        found = [each.wire() for each in self.hypotheses]
        attempt.send(0, [], finish=found[0].finish, found=found)
        return False


@dataclass(frozen=True)
class Break:
    """The session breaks; the process lives and may be dialed again."""

    def __call__(self, attempt: Attempt) -> bool:
        attempt.worker.after_writing(attempt.session, lambda: attempt.session.close("the script says so"))
        return False


@dataclass(frozen=True)
class Die:
    """The listener and all its sessions go, for good."""

    def __call__(self, attempt: Attempt) -> bool:
        attempt.worker.after_writing(attempt.session, attempt.worker.stop)
        return False


@dataclass(frozen=True)
class Wait:
    """Says nothing more: the rest of the script waits for `ScriptedWorker.go_on`."""

    def __call__(self, attempt: Attempt) -> bool:
        return False


FOREVER = Say(1 << 20)


class ScriptedWorker:
    """Its own words thread and listener. `submits` and `cancels` are what arrived, in order."""

    def __init__(
        self,
        name: str,
        *,
        script: Sequence[Action] = (FOREVER,),
        roles: Sequence[Role] = (Role.DECODE,),
        sources: Iterable[ScriptedWorker] = (),
        compatibility_hash: bytes = b"h" * 16,
        config: WordsConfig | None = None,
        cache: BlockManager | None = None,
    ) -> None:
        self.name = name
        self.block_log = BlockLog(cache or BlockManager([GroupCapacity("self", 1, 1)]))
        self.queries: list[pb.BlockQuery] = []
        self.num_dumps = 0
        self.script: Sequence[Action] = script
        self.text: list[int] | None = None  # says these token ids, again and again, instead
        self.roles = tuple(roles)
        self.incarnation = uuid4().hex
        self.compatibility_hash = compatibility_hash
        self.state = MemberState.READY
        self.submits: list[pb.Submit] = []
        self.cancels: list[RequestKey] = []
        self.load = pb.LoadReport(pairs=[pb.PairReport(source_incarnation=s.incarnation, warm=True) for s in sources])
        self.num_clears = 0
        self._held: list[tuple[Attempt, list[Action]]] = []
        self._sessions: list[Session] = []
        self._stopped = False
        self._changed = threading.Condition()
        self._words = WordsThread(config=config or WordsConfig(heartbeat_s=0.1, heartbeat_timeout_s=5)).start()
        identity = pb.Identity(
            kind=pb.WORKER,
            name=name,
            incarnation=self.incarnation,
            compatibility_hash=compatibility_hash,
            roles=[STAGES[role] for role in roles],
            ranks=[pb.RankInfo(tp_size=1)],
        )
        self._server = WordsServer(self._words, identity, SECRET, self, ports=[0])
        self.address = self._server.start()

    @property
    def member(self) -> Member:
        return Member(
            name=self.name,
            pool=self.roles[0].value,
            incarnation=self.incarnation,
            address=self.address,
            roles=self.roles,
            compatibility_hash=self.compatibility_hash,
            pid=4711,
            state=self.state,
        )

    def warm(self, *sources: ScriptedWorker) -> None:
        """Reports that these, and no others, can be read from."""
        pairs = [pb.PairReport(source_incarnation=source.incarnation, warm=True) for source in sources]
        self.report(pb.LoadReport(pairs=pairs))

    def report(self, load: pb.LoadReport) -> None:
        self.load = load
        for session in list(self._sessions):
            session.send(pb.Frame(load_report=load))

    def report_load(self) -> None:
        """As it is, with the last id of its block events."""
        self.load.last_event_id = self.block_log.last_id
        self.report(self.load)

    def tell_blocks(self, *, lost: bool = False) -> None:
        """What changed in its cache; `lost`: nobody hears of it."""
        events = self.block_log.collect()
        if events is not None and not lost:
            self.send_blocks(events)

    def send_blocks(self, events: pb.BlockEvents) -> None:
        for session in list(self._sessions):
            session.send_bulk("blocks", events.SerializeToString())

    def break_sessions(self) -> None:
        for session in list(self._sessions):
            session.close("the test says so")

    def say_goodbye(self) -> None:
        for session in list(self._sessions):
            session.send(pb.Frame(goodbye=pb.Goodbye(reason="drain")))

    @property
    def num_held(self) -> int:
        """Attempts that `Wait` holds."""
        return len(self._held)

    def go_on(self) -> None:
        """What was held by `Wait` goes on."""
        held, self._held = self._held, []
        for attempt, rest in held:
            self._words.post(self._play, attempt, rest)

    def wait(self, holds: Callable[[ScriptedWorker], bool]) -> None:
        """Until something that arrives makes it true."""
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), DEADLINE_S), (self.submits, self.cancels)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._words.stop()

    def after_writing(self, session: Session, call: Callable[[], None]) -> None:
        """Calls from a thread of its own when the peer has got what the session holds."""

        def wait_and_call() -> None:
            with suppress(CancelledError, RuntimeError):  # another script stopped the worker meanwhile
                self._words.wait(session.flush())
                call()

        threading.Thread(target=wait_and_call, daemon=True).start()

    # ------------------------------------------------------------ SessionHandler

    def on_open(self, session: Session) -> None:
        self._sessions.append(session)
        session.send(pb.Frame(load_report=self.load))
        self._notify()

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "submit":
            self.submits.append(frame.submit)
            attempt = Attempt(self, session, frame.submit, index=len(frame.submit.emitted_token_ids))
            self._play(attempt, list(self.script))
        elif kind == "cancel":
            self.cancels.append(RequestKey.of(frame.cancel.key))
            self._held = [(a, rest) for a, rest in self._held if RequestKey.of(a.submit.key) != self.cancels[-1]]
        elif kind == "block_query":
            self.queries.append(frame.block_query)
            for events in self.block_log.after(frame.block_query.last_id):
                self.num_dumps += events.dump
                session.send_bulk("blocks", events.SerializeToString())
        elif kind == "admin_request":
            self.num_clears += frame.admin_request.clear_cache
            answer = pb.AdminResponse(id=frame.admin_request.id, load=self.load, counters={"steps": 1.0})
            session.send(pb.Frame(admin_response=answer))
        self._notify()

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None: ...

    def on_broken(self, session: Session, error: SessionError) -> None:
        if session in self._sessions:
            self._sessions.remove(session)
        self._notify()

    def on_overflow(self, session: Session, key: RequestKey) -> None: ...

    def route(self, submit: pb.Submit) -> pb.Route:
        stages = {stage.stage: stage.worker for stage in submit.plan.stages}
        prefill = stages[pb.PREFILL]
        local = prefill.incarnation == self.incarnation
        route = pb.Route(
            decode=stages[pb.DECODE],
            decode_pid=4711,
            transport="" if local else "loopback",
            prompt_tokens=len(submit.prompt_token_ids),
            chunks=1,
            blocks=0 if local else 3,
            bytes=0 if local else 3000,
            transfer_s=0 if local else 0.001,
            local_prefill=local,
            prefill_prefix_hit_tokens=2,
        )
        if not local:
            route.prefill.CopyFrom(prefill)
            route.prefill_pid = 4712
        return route

    def _play(self, attempt: Attempt, script: list[Action]) -> None:
        while script:
            action = script.pop(0)
            if isinstance(action, Wait):
                self._held.append((attempt, script))
                self._notify()
                return
            if not action(attempt):
                return

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def membership(*workers: ScriptedWorker, version: int = 1) -> Membership:
    return Membership(version, tuple(worker.member for worker in workers))
