"""An ingress that has no clock and no manners: it submits what it is told, and remembers every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import uuid4

from cluster.errors import SessionError
from cluster.hashing import block_hashes, chain_root
from cluster.membership import Member
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey, SamplingParams
from cluster.rpc import Dialer
from cluster.session import Session
from cluster.words_thread import WordsThread
from tests.support.plain_cluster import SECRET

DEADLINE_S = 20.0


class RawIngress:
    """Sessions to the workers it is shown. Without replays; no deadline of its own."""

    def __init__(self, words: WordsThread, block_size: int = 0) -> None:
        self._block_size = block_size
        identity = pb.Identity(kind=pb.INGRESS, name="raw-ingress", incarnation=uuid4().hex)
        self._dialer = Dialer(words, identity, SECRET, self)
        self._sessions: dict[str, Session] = {}
        self.last: dict[str, pb.SequenceTokens] = {}  # by request id: what ended it
        self.num_tokens: dict[str, int] = {}
        self.token_ids: dict[str, list[int]] = {}
        self.refused: dict[str, pb.Failure] = {}  # by request id: what a source answered

    async def session(self, worker: Member) -> Session:
        """Dialed if need be."""
        self._dialer.keep(worker.address, worker.incarnation)
        async with asyncio.timeout(DEADLINE_S):
            while (session := self._sessions.get(worker.incarnation)) is None:
                await asyncio.sleep(0.005)
        return session

    async def submit(
        self,
        decode: Member,
        prefill: Member,
        prompt: tuple[int, ...],
        sampling: SamplingParams | pb.SamplingParams,
        deadline_ms: int = 0,
        holding: tuple[Member, int] | None = None,
        *,
        source: tuple[int, ...] = (),
        encoders: Sequence[Member] = (),
        local_prefill_allowed: bool = False,
    ) -> str:
        """The request's id, when the words are on their way. `holding`: whose cache is said to have how many of its
        blocks; only then the hashes of the blocks are told. `source`: an encoder input, which `encoders` are said to
        read."""
        session = await self.session(decode)
        key = RequestKey(uuid4().hex, 1)
        computes = pb.StagePlan(stage=pb.PREFILL, worker=_ref(prefill))
        hashes: list[bytes] = []
        if holding is not None:
            computes.holding.CopyFrom(pb.Holding(holder=_ref(holding[0]), num_blocks=holding[1]))
            hashes = block_hashes(chain_root(decode.compatibility_hash), prompt, self._block_size)
        stages = [pb.StagePlan(stage=pb.ENCODE, worker=_ref(each)) for each in encoders]
        stages += [computes, pb.StagePlan(stage=pb.DECODE, worker=_ref(decode))]
        plan = pb.Plan(stages=stages, local_prefill_allowed=local_prefill_allowed)
        asked = sampling.wire() if isinstance(sampling, SamplingParams) else sampling
        submit = pb.Submit(
            key=key.wire(),
            plan=plan,
            prompt_token_ids=prompt,
            sampling=asked,
            deadline_ms=deadline_ms,
            block_hashes=b"".join(hashes),
            encoder_token_ids=source,
        )
        session.send(pb.Frame(submit=submit), key)
        return key.request_id

    async def refusal_of(self, request_id: str) -> pb.Failure:
        async with asyncio.timeout(DEADLINE_S):
            while request_id not in self.refused:
                await asyncio.sleep(0.005)
        return self.refused[request_id]

    async def first_token_of(self, request_id: str) -> int:
        async with asyncio.timeout(DEADLINE_S):
            while not self.token_ids.get(request_id):
                await asyncio.sleep(0.005)
        return self.token_ids[request_id][0]

    async def end_of(self, request_id: str) -> pb.SequenceTokens:
        async with asyncio.timeout(DEADLINE_S):
            while request_id not in self.last:
                await asyncio.sleep(0.005)
        return self.last[request_id]

    def cancel(self, decode: Member, request_id: str) -> None:
        key = RequestKey(request_id, 1)
        self._sessions[decode.incarnation].send(pb.Frame(cancel=pb.Cancel(key=key.wire(), reason="a test")), key)

    def stop(self) -> None:
        self._dialer.stop()

    # ------------------------------------------------------------ words thread

    def on_open(self, session: Session) -> None:
        self._sessions[session.peer.incarnation] = session

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        if frame.HasField("kv_failed"):
            self.refused[frame.kv_failed.key.request_id] = frame.kv_failed.failure
        for tokens in frame.step_tokens.sequences:
            name = tokens.key.request_id
            assert name not in self.last, "words after the last word"
            self.num_tokens[name] = self.num_tokens.get(name, 0) + len(tokens.token_ids)
            self.token_ids.setdefault(name, []).extend(tokens.token_ids)
            if tokens.finish:
                self.last[name] = tokens

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None: ...

    def on_broken(self, session: Session, error: SessionError) -> None:
        self._sessions.pop(session.peer.incarnation, None)

    def on_overflow(self, session: Session, key: RequestKey) -> None: ...


def _ref(member: Member) -> pb.WorkerRef:
    assert member.roles
    return pb.WorkerRef(name=member.name, incarnation=member.incarnation)
