"""Who sends a request, as the routes know it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hashing import salt_of
from deploy.api_keys import ApiKey

_NO_KEY = ApiKey("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    key: ApiKey = _NO_KEY  # without limits, where no key is asked for
    session: str = ""  # what it calls the session that the request belongs to; "": none

    def cache_salt(self, asked: str | None) -> str:
        """Of a request that names one, or none. Whoever has a salt of its own cannot leave it."""
        return salt_of(self.key.limits.cache_salt, asked or "")
