"""The two gRPC streams of a pair: how they are opened, what they raise, how one says why it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from contextlib import closing
from typing import Final, Protocol, cast

import grpc
import grpc.aio

from cluster.errors import SessionBroken, SessionError
from cluster.parts import FRAME_SLACK_BYTES, MAX_FRAME_BYTES

# What gRPC raises when a stream is gone, on either side.
STREAM_ERRORS: Final = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
_MAX_GRPC_BYTES: Final = 4 * (MAX_FRAME_BYTES + FRAME_SLACK_BYTES)  # far over: gRPC ends the stream before reading it
OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_GRPC_BYTES),
    ("grpc.max_send_message_length", _MAX_GRPC_BYTES),
    ("grpc.keepalive_time_ms", 2**31 - 1),  # off: heartbeats are frames
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new dial is a new connection
)
_REASON_HEADER: Final = "sluice-reason-bin"


class Stream(Protocol):
    """One bidirectional gRPC stream of raw bytes, seen from either side. `read` returns grpc.aio.EOF at its end."""

    async def read(self) -> object: ...

    async def write(self, message: bytes, /) -> None: ...


class DialedStream(Stream, Protocol):
    """The same from the dialer's side."""

    async def done_writing(self) -> None: ...

    async def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def open_stream(channel: grpc.aio.Channel, path: str) -> DialedStream:
    """Raw bytes in both directions: what arrives is parsed where a mistake can be blamed on its session."""
    opened = channel.stream_stream(path, request_serializer=None, response_deserializer=None)
    return cast(DialedStream, opened(request_iterator=None))


async def say_why(context: grpc.aio.ServicerContext[bytes, bytes], error: SessionError | None, *, well: bool) -> None:
    """Ends a stream of the listener. After a failure gRPC drops what the peer has not read, so others end `well`."""
    if well:
        context.set_trailing_metadata(((_REASON_HEADER, str(error).encode()),))
    else:
        await context.abort(grpc.StatusCode.ABORTED, str(error))


async def last_word(stream: DialedStream) -> str:
    """Why the listener ended a stream that ended well."""
    said = [value for key, value in await stream.trailing_metadata() or () if key == _REASON_HEADER]
    return "".join(f": {value.decode(errors='replace')}" for value in said if isinstance(value, bytes))


def broken(name: str, error: Exception) -> SessionBroken:
    """What an error of gRPC means for the session with `name`."""
    if isinstance(error, grpc.aio.AioRpcError):
        return SessionBroken(f"the stream to {name} broke: {error.code().name}: {error.details()}")
    return SessionBroken(f"the stream to {name} broke: {error!r}")


async def nobody_listens(address: str) -> bool:
    """Whether its host refuses connections there, which gRPC tells only in words. False where it says nothing."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    writer.close()
    return False


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_free(host: str, port: int) -> bool:
    """Asked of the kernel first: gRPC writes every failed bind to stderr."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
