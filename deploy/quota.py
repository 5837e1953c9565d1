"""What each API key may still do on one ingress replica: token buckets for its rates, a count for its open requests.

A rate is a bucket that holds a minute's worth and fills evenly. Tokens are counted when they are known, so they may
be overdrawn by the requests that are open; then nothing is let in until that is made good.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.errors import Busy
from cluster.metrics import Metrics
from deploy.api_keys import ApiKey

_MINUTE_S = 60.0
_CONCURRENT_RETRY_S = 1.0


class Bucket:
    """One thread. `per_minute` may change while it is used."""

    def __init__(self, now: float) -> None:
        self._missing = 0.0  # from a full one
        self._at = now

    def wait_s(self, needed: float, per_minute: float, now: float) -> float:
        """Until it holds `needed`, or is full where it cannot hold so much; 0: it does."""
        self._missing = max(0.0, self._missing - (now - self._at) * per_minute / _MINUTE_S)
        self._at = now
        excess = self._missing + min(needed, per_minute) - per_minute
        return max(0.0, excess * _MINUTE_S / per_minute)

    def take(self, amount: float) -> None:
        self._missing += amount


class Account:
    """Of one key."""

    def __init__(self, now: float) -> None:
        self.num_open = 0
        self.requests = Bucket(now)
        self.tokens = Bucket(now)


class Visit:
    """One HTTP request of a key, from its acceptance to its end."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._open = True

    def spend(self, num_tokens: int) -> None:
        self._account.tokens.take(num_tokens)

    def leave(self) -> None:
        """Idempotent."""
        if self._open:
            self._open = False
            self._account.num_open -= 1


class Quotas:
    """The replica's part of the limits of all keys. One thread."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._num_replicas = 1
        self._accounts: dict[str, Account] = {}  # by the key's name: as many as there are keys

    def set_replicas(self, num_replicas: int) -> None:
        """How many live ones divide the limits."""
        self._num_replicas = max(1, num_replicas)

    def enter(self, key: ApiKey) -> Visit:
        """Raises Busy, which names the limit and when to come again."""
        now, limits, share = self._clock(), key.limits, 1 / self._num_replicas
        account = self._accounts.setdefault(key.name, Account(now))
        if limits.max_concurrent is not None and account.num_open >= max(1.0, limits.max_concurrent * share):
            raise self._refusal("key_max_concurrent", limits.max_concurrent, "requests at once", _CONCURRENT_RETRY_S)
        if limits.tokens_per_minute is not None:
            wait_s = account.tokens.wait_s(1, max(1.0, limits.tokens_per_minute * share), now)
            if wait_s:
                raise self._refusal("key_tokens_per_minute", limits.tokens_per_minute, "tokens a minute", wait_s)
        if limits.requests_per_minute is not None:
            wait_s = account.requests.wait_s(1, max(1.0, limits.requests_per_minute * share), now)
            if wait_s:
                raise self._refusal("key_requests_per_minute", limits.requests_per_minute, "requests a minute", wait_s)
            account.requests.take(1)
        account.num_open += 1
        return Visit(account)

    def _refusal(self, limit: str, value: int, what: str, retry_after_s: float) -> Busy:
        self._metrics.rejections.labels(limit).inc()
        shared = f" (divided by {self._num_replicas} replicas)" if self._num_replicas > 1 else ""
        text = f"your key's limit of {value} {what}{shared} is reached; retry later"
        return Busy(text, retry_after_s=retry_after_s, limit=limit)
