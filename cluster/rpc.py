"""Channels of the words plane: who listens, who dials, and the thread they live on.

    words = WordsThread(step_age, config)        one event loop and one heart per process
    WordsServer(words, identity, secret, handler).start() -> "host:port"
    Dialer(words, identity, secret, handler).keep("host:port", incarnation)

A dialer keeps its peers: whatever breaks is dialed again with backoff until dropped. Session and Bulk stream of a
pair share one channel. Everything here is thread-safe; start, stop and flush block, so they must not be called on
the words thread, where the handlers run.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.errors import ConfigError, NobodyListens, Refused, SessionBroken, SessionError
from cluster.handshake import DialerHandshake, EpochBook, ListenerHandshake, refusal
from cluster.own_address import announced
from cluster.parts import MAX_FRAME_BYTES
from cluster.protos import BULK_PATH, SERVICE, SESSION_PATH
from cluster.protos import worker_pb2 as pb
from cluster.session import Session, SessionHandler
from cluster.streams import (
    OPTIONS,
    STREAM_ERRORS,
    Stream,
    bracketed,
    broken,
    is_free,
    nobody_listens,
    open_stream,
    say_why,
)
from cluster.tls import add_port, open_channel
from cluster.words_thread import WordsThread

__all__ = ["Dialer", "Session", "SessionHandler", "WordsServer", "WordsThread"]

MAX_PENDING_HANDSHAKES: Final = 256
_FIRST_BACKOFF_S: Final = 0.05
_STEADY_S: Final = 1.0  # a session that lived this long lets the backoff start again
_log = logging.getLogger(__name__)


class WordsServer:
    """Accepts sessions. A second session of one incarnation ends the first: it dialed again, so the first is dead."""

    def __init__(
        self,
        words: WordsThread,
        identity: pb.Identity,
        secret: bytes,
        handler: SessionHandler,
        *,
        host: str | None = None,
        ports: Sequence[int] | None = None,
    ) -> None:
        """`host` and `ports` default to the config's; port 0 takes any free one."""
        config = words.config
        ListenerHandshake(identity, secret, EpochBook())  # an empty secret fails here, not at the first peer
        self._words = words
        self._identity = identity
        self._secret = secret
        self._handler = handler
        self._host = host or config.host
        self._ports = ports if ports is not None else range(config.port_min, config.port_max + 1)
        self._epochs = EpochBook()
        self._sessions: dict[str, Session] = {}
        self._num_pending = 0
        self._server: grpc.aio.Server | None = None
        self.address = ""

    def start(self) -> str:
        """Listens on the first free port; the address to announce. Raises ConfigError if none is free."""
        return self._words.wait(self._start())

    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def stop(self, *, flush_s: float = 0.0) -> None:
        """Ends all sessions; before that, waits up to `flush_s` for what is queued to be written."""
        self._words.wait(self.aclose(flush_s))

    async def aclose(self, flush_s: float = 0.0) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        await _end_all(self.sessions(), "the listener stops", flush_s)
        await server.stop(grace=0.2)  # lets the reasons out

    async def _start(self) -> str:
        server = grpc.aio.server(options=OPTIONS)
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._accept),
            "Bulk": grpc.stream_stream_rpc_method_handler(self._accept_bulk),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"{bracketed(announced(self._host))}:{self._bind(server)}"
        await server.start()
        self._server = server
        self._words.adopt(self)
        return self.address

    def _bind(self, server: grpc.aio.Server) -> int:
        for port in self._ports:
            if not is_free(self._host, port):
                continue
            with suppress(RuntimeError):  # taken since
                return add_port(server, f"{bracketed(self._host)}:{port}", self._words.tls)
        raise ConfigError(
            "words.port_min",
            f"no free port among {len(self._ports)} from {self._ports[0] if self._ports else '-'} on {self._host}; "
            "widen words.port_min – words.port_max",
        )

    async def _accept(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One Session stream, from its first byte to its end."""
        session: Session | None = None
        if self._num_pending >= MAX_PENDING_HANDSHAKES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._num_pending} handshakes are pending")
        self._num_pending += 1
        try:
            async with asyncio.timeout(self._words.config.connect_timeout_s):
                session = await self._shake(context)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the handshake took too long")
        finally:
            self._num_pending -= 1
        if session is None:
            return
        await session.carry(context)
        await say_why(context, session.error, well=session.finished)

    async def _shake(self, stream: Stream) -> Session | None:
        handshake = ListenerHandshake(self._identity, self._secret, self._epochs)
        try:
            while True:
                data = await stream.read()
                if not isinstance(data, bytes):
                    return None
                if self._words.step_age().stuck(limit_s := self._words.config.step_timeout_s):
                    raise Refused(pb.NO_WORKER, f"the engine has work but no step for {limit_s:g} s; dial again later")
                if len(data) > MAX_FRAME_BYTES:
                    raise Refused(pb.INVALID, f"a frame of {len(data)} bytes in the handshake")
                reply = handshake.receive(data)
                if handshake.agreement is not None:
                    break
                await stream.write(reply)
        except Refused as error:
            _log.warning("%s refused a session: %s", self._identity.name, error)
            with suppress(*STREAM_ERRORS):
                await stream.write(refusal(error))
            return None
        config, heart = self._words.config, self._words.heart
        session = Session(handshake.agreement, self._handler, heart, config, dialed=False, on_end=self._forget)
        if (older := self._sessions.get(session.peer.incarnation)) is not None:
            older.end(SessionBroken(f"{session.peer.name} dialed again (epoch {session.epoch})"))
        self._sessions[session.peer.incarnation] = session
        session.begin()  # before Ready: the peer's next frames must find the handler told
        try:
            await stream.write(reply)
        except STREAM_ERRORS as error:
            session.end(broken(session.peer.name, error))
        except asyncio.CancelledError:
            session.end(SessionBroken(f"{session.peer.name} went away during the handshake"))
            raise
        return session

    async def _accept_bulk(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One Bulk stream; its first frame names the session it belongs to."""
        session: Session | None = None
        try:
            async with asyncio.timeout(self._words.config.connect_timeout_s):
                data = await context.read()
            hello = pb.BulkFrame.FromString(data) if isinstance(data, bytes) else pb.BulkFrame()
        except (TimeoutError, DecodeError):
            hello = pb.BulkFrame()
        session = self._sessions.get(hello.incarnation)
        if session is None or not session.bind_bulk(hello):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no open session has this bulk token")
            return
        await session.carry_bulk(context)
        await say_why(context, session.error, well=session.finished)

    def _forget(self, session: Session) -> None:
        if self._sessions.get(session.peer.incarnation) is session:
            del self._sessions[session.peer.incarnation]


@dataclass(slots=True, eq=False)
class _Link:
    """A peer that is kept."""

    address: str
    incarnation: str
    task: asyncio.Task[None] | None = None
    session: Session | None = None
    error: SessionError | None = None


class Dialer:
    """Keeps sessions to peers.

    `on_failed(incarnation or address, error)` is called on the words thread when a dial gave no session (refused,
    unreachable), once per new reason of a peer.
    """

    def __init__(
        self,
        words: WordsThread,
        identity: pb.Identity,
        secret: bytes,
        handler: SessionHandler,
        *,
        on_failed: Callable[[str, SessionError], None] | None = None,
    ) -> None:
        DialerHandshake(identity, secret, 1)  # an empty secret fails here, not at the first peer
        self._words = words
        self._identity = identity
        self._secret = secret
        self._handler = handler
        self._on_failed = on_failed
        self._epochs = count(1)
        self._links: dict[str, _Link] = {}
        self._random = random.Random()
        words.adopt(self)

    def keep(self, address: str, incarnation: str = "") -> None:
        """Dials until dropped. Without an incarnation, whoever answers there is taken, and drop takes the address."""
        self._words.post(self._keep, address, incarnation)

    def drop(self, incarnation: str) -> None:
        """Ends the session, if there is one, and dials no more."""
        self._words.post(self._drop, incarnation, "the peer was dropped")

    def sessions(self) -> list[Session]:
        """The open ones."""
        return [link.session for link in list(self._links.values()) if link.session is not None and link.session.open]

    def error(self, incarnation: str) -> SessionError | None:
        """Why the last dial of a kept peer failed, or its last session broke; None while a session is open."""
        link = self._links.get(incarnation)
        return None if link is None or (link.session is not None and link.session.open) else link.error

    def stop(self, *, flush_s: float = 0.0) -> None:
        """Drops all peers; before that, waits up to `flush_s` for what is queued to be written."""
        self._words.wait(self.aclose(flush_s))

    async def aclose(self, flush_s: float = 0.0) -> None:
        await _end_all(self.sessions(), "the dialer stops", flush_s)
        tasks = [link.task for link in self._links.values() if link.task is not None]
        for incarnation in list(self._links):
            self._drop(incarnation, "the dialer stops")
        await asyncio.gather(*tasks, return_exceptions=True)

    def _keep(self, address: str, incarnation: str) -> None:
        link = self._links.get(incarnation or address)
        if link is not None and link.address == address:
            return
        self._drop(incarnation or address, f"it is at {address} now")
        link = self._links[incarnation or address] = _Link(address, incarnation)
        link.task = asyncio.create_task(self._redial(link))

    def _drop(self, incarnation: str, reason: str) -> None:
        link = self._links.pop(incarnation, None)
        if link is None:
            return
        if link.session is not None:
            link.session.finish(reason)
        if link.task is not None:
            link.task.cancel()

    async def _redial(self, link: _Link) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = _FIRST_BACKOFF_S
        while True:
            dialed_at = loop.time()
            try:
                await self._dial(link)
            except SessionError as error:
                self._note(link, error)
            except STREAM_ERRORS as error:
                self._note(link, await self._why(link.address, broken(link.address, error)))
            except TimeoutError:
                timeout_s = self._words.config.connect_timeout_s
                self._note(link, SessionBroken(f"no session with {link.address} within {timeout_s:g} s"))
            if link.session is not None and loop.time() - dialed_at > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s * self._random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, self._words.config.redial_max_s)

    async def _why(self, address: str, error: SessionBroken) -> SessionBroken:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._words.config.connect_timeout_s):
                if await nobody_listens(address):
                    return NobodyListens(f"nobody listens at {address}")
        return error

    def _note(self, link: _Link, error: SessionError) -> None:
        if link.error is None or str(link.error) != str(error):
            _log.warning("%s has no session with %s: %s", self._identity.name, link.address, error)
            if self._on_failed is not None:
                self._on_failed(link.incarnation or link.address, error)
        link.error = error

    async def _dial(self, link: _Link) -> None:
        """One dial and the session it gives, to its end. Raises when there was none."""
        link.session = None
        if self._words.step_age().stuck(limit_s := self._words.config.step_timeout_s):
            raise SessionBroken(f"our own engine has work but has not stepped for {limit_s:g} s")
        async with open_channel(link.address, self._words.tls) as channel:
            stream = open_stream(channel, SESSION_PATH)
            async with asyncio.timeout(self._words.config.connect_timeout_s):
                session = await self._shake(link, stream)
                bulk = open_stream(channel, BULK_PATH)
                hello = pb.BulkFrame(incarnation=self._identity.incarnation, epoch=session.epoch)
                hello.token = session.bulk_token
                await bulk.write(hello.SerializeToString())
            link.session = session
            session.begin()
            try:
                await asyncio.gather(session.carry(stream), session.carry_bulk(bulk))
            finally:
                link.error = session.error

    async def _shake(self, link: _Link, stream: Stream) -> Session:
        handshake = DialerHandshake(
            self._identity, self._secret, next(self._epochs), expected_incarnation=link.incarnation
        )
        await stream.write(handshake.hello())
        while handshake.agreement is None:
            data = await stream.read()
            if not isinstance(data, bytes):
                raise SessionBroken(f"{link.address} closed the stream during the handshake")
            try:
                reply = handshake.receive(data)
            except Refused as error:
                await _tell_refusal(stream, error)
                raise
            if reply is not None:
                await stream.write(reply)
        config, heart = self._words.config, self._words.heart
        return Session(handshake.agreement, self._handler, heart, config, dialed=True, on_end=_nothing)


async def _tell_refusal(stream: Stream, error: Refused) -> None:
    """Best effort: the listener's log should say why, too. It closes the stream when it has read it."""
    with suppress(TimeoutError, *STREAM_ERRORS):
        async with asyncio.timeout(1.0):
            await stream.write(refusal(error))
            await stream.read()


async def _end_all(sessions: Sequence[Session], reason: str, flush_s: float) -> None:
    if flush_s > 0:
        with suppress(TimeoutError):
            async with asyncio.timeout(flush_s):
                await asyncio.gather(*(session.flush() for session in sessions))
    for session in sessions:
        session.finish(reason)
    if flush_s > 0:
        await asyncio.gather(*(session.gone() for session in sessions))


def _nothing(_: Session) -> None:
    """A link finds out by itself that its session has ended."""
