"""Equal prompts that arrive together: where the second one comes to the worker of the first, it waits for those blocks
instead of having them computed and read once more."""

from __future__ import annotations

from cluster.hashing import HASH_BYTES
from router.flight import Flight, State


class Siblings:
    """The flights whose prompt is on its way to a decode worker. One thread."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, bytes], Flight] = {}  # by incarnation and last full block of the prompt
        self._keys: dict[str, tuple[str, bytes]] = {}  # of them, by request id

    def join(self, flight: Flight, incarnation: str, hashes: bytes) -> str:
        """Of a flight that was just placed there, with the hashes of its full blocks: the id of the request whose
        blocks it will share; "" where there is none, and others may follow this one."""
        sampling = flight.request.sampling
        self.left(flight)
        if not hashes or flight.emitted or sampling.needs_whole_prompt or sampling.pooling is not None:
            return ""
        key = incarnation, hashes[-HASH_BYTES:]
        first = self._first.get(key)
        if first is not None and first.state is State.RUNNING and not first.emitted:
            return first.request.request_id
        self._first[key] = flight
        self._keys[flight.request.request_id] = key
        return ""

    def left(self, flight: Flight) -> None:
        """It has ended, or goes elsewhere."""
        key = self._keys.pop(flight.request.request_id, None)
        if key is not None and self._first.get(key) is flight:
            del self._first[key]
