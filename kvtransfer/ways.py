"""Which of several ways to read from a source is the fastest: reads by one after the other, timed (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import TransferError

READS = 3  # timed, by each way; one more goes before them and pays for the connection
BEATEN = 0.5  # of the best rate: a way that is seen to do less is not read by again


class Trial:
    """Says by which `way` to read next, until it is `over`. Each read is of `num_bytes`.

    A way that fails is out. `rates`: bytes/s of the best read by each of the others so far; `error`: the first one.
    """

    def __init__(self, ways: Sequence[str], num_bytes: int) -> None:
        self.way, *self._others = ways
        self.over = False
        self.rates: dict[str, float] = {}
        self.error: TransferError | None = None
        self._num_bytes = num_bytes
        self._reads_left = READS + 1

    @property
    def best(self) -> str | None:
        """None: all have failed."""
        return max(self.rates, key=lambda way: self.rates[way], default=None)

    def took(self, seconds: float) -> None:
        self._reads_left -= 1
        if self._reads_left == READS:
            return
        rate = self.rates[self.way] = max(self._num_bytes / max(seconds, 1e-9), self.rates.get(self.way, 0.0))
        if not self._reads_left or rate < BEATEN * max(self.rates.values()):
            self._turn()

    def failed(self, error: TransferError) -> None:
        self.rates.pop(self.way, None)
        self.error = self.error or error
        self._turn()

    def _turn(self) -> None:
        if self._others:
            self.way, self._reads_left = self._others.pop(0), READS + 1
        else:
            self.over = True
