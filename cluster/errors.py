"""Every error a person or a peer can see.

    SluiceError
    ├── ConfigError            a config key, with its path and the remedy
    ├── RequestError           about one request; carries an ErrorCode, becomes an HTTP status
    │   ├── InvalidRequest     400
    │   ├── RequestTooLong     413
    │   ├── Busy               429, with retry_after_s
    │   ├── NoWorker           503
    │   │   └── Draining       the worker leaves, or gives up the role: another one takes it
    │   ├── DeadlineExceeded   504
    │   ├── Cancelled          499
    │   ├── WorkerFailed       500, the request killed or failed on a worker
    │   └── SourcesLost        500, two prefill workers died or failed under the request
    ├── SessionError           the words plane: refused handshake, broken session, oversize frame
    │   ├── Refused
    │   └── SessionBroken      the stream is gone, or the process behind it
    │       ├── NobodyListens  at the peer's address, whose host refuses the connection
    │       ├── SessionClosed  by this end, on purpose
    │       ├── SessionSilent  no heartbeat, or no step, for too long
    │       └── SessionStuffed the peer does not read: the outbox is full
    ├── TransferError          the bytes plane
    │   ├── PeerLost           the other process is gone
    │   └── NotRegistered      memory outside every registered region
    └── CheckpointError        a weight file, with the tensor and the remedy

Messages name the offending value and the remedy. `assert` is for our own bugs.
"""

from cluster.protos import worker_pb2 as pb


class SluiceError(Exception):
    """Root of the tree."""

    def __reduce__(self) -> tuple[object, ...]:
        """Survives the way out of a Ray actor, whatever its constructor takes."""
        return _rebuilt, (type(self), self.args, dict(vars(self)))


def _rebuilt(kind: type[SluiceError], args: tuple[object, ...], state: dict[str, object]) -> SluiceError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class ConfigError(SluiceError, ValueError):
    """`path` is the dotted key, e.g. ``pools.decode.workers``."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class RequestError(SluiceError):
    """Ends one request. `code` travels on the wire, `status` over HTTP."""

    code: pb.ErrorCode = pb.INTERNAL
    status: int = 500


class InvalidRequest(RequestError, ValueError):
    code = pb.INVALID
    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLong(InvalidRequest):
    code = pb.TOO_LONG
    status = 413


class Busy(RequestError):
    code = pb.BUSY
    status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0, *, limit: str = "queue_full") -> None:
        """`limit`: which one, from a closed set (docs/api.md)."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit


class NoWorker(RequestError):
    code = pb.NO_WORKER
    status = 503


class Draining(NoWorker):
    code = pb.DRAINING


class DeadlineExceeded(RequestError):
    code = pb.DEADLINE
    status = 504


class Cancelled(RequestError):
    code = pb.CANCELLED
    status = 499


class WorkerFailed(RequestError):
    code = pb.INTERNAL
    status = 500


class SourcesLost(RequestError):
    code = pb.PEER_LOST


class SessionError(SluiceError):
    """`reason`: for metrics, from a closed set."""

    code: pb.ErrorCode = pb.PEER_LOST
    reason: str = "mistake"  # of the peer: what it sent cannot be


class Refused(SessionError):
    """The handshake was refused: wrong secret, protocol range, compatibility hash, replayed epoch."""

    def __init__(self, code: pb.ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class SessionBroken(SessionError):
    reason = "gone"


class NobodyListens(SessionBroken):
    """At the peer's address, whose host answered: its process is gone."""


class SessionClosed(SessionBroken):
    reason = "closed"


class SessionSilent(SessionBroken):
    reason = "silent"


class SessionStuffed(SessionBroken):
    reason = "stuffed"


class TransferError(SluiceError):
    pass


class PeerLost(TransferError):
    pass


class NotRegistered(TransferError):
    pass


class CheckpointError(SluiceError):
    pass


_BY_CODE: dict[pb.ErrorCode, type[RequestError]] = {
    pb.INVALID: InvalidRequest,
    pb.TOO_LONG: RequestTooLong,
    pb.BUSY: Busy,
    pb.OVERFLOW: Busy,
    pb.DRAINING: Draining,
    pb.NO_WORKER: NoWorker,
    pb.DEADLINE: DeadlineExceeded,
    pb.CANCELLED: Cancelled,
}


def from_failure(failure: pb.Failure) -> RequestError:
    """The exception a wire Failure stands for; unknown codes become WorkerFailed."""
    return _BY_CODE.get(failure.code, WorkerFailed)(failure.message)
