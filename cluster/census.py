"""The controller's count of its workers, as metrics."""

from __future__ import annotations

from collections import Counter
from itertools import product

from cluster.membership import Membership, MemberState, diff
from cluster.metrics import Metrics


class Census:
    """Shown every membership, in order."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = Membership()
        self._known: set[str] = set()  # names with a place, also while nobody is in it
        self._pools: set[str] = set()

    def take(self, membership: Membership) -> None:
        """A name that comes back with another incarnation was restarted; one that was drained for good is forgotten."""
        change = diff(self._last, membership)
        self._last = membership
        for member in change.joined:
            if member.name in self._known:
                self._metrics.restarts.labels(member.pool).inc()
            self._known.add(member.name)
        present = {member.name for member in membership.members}
        for member in change.left:
            if member.state is MemberState.DRAINING and member.name not in present:
                self._known.discard(member.name)
        self._pools.update(member.pool for member in membership.members)
        for pool in self._pools:
            self._metrics.restarts.labels(pool)  # at 0: rate() does not see a series that begins at 1
        counts = Counter((member.pool, member.state) for member in membership.members)
        self._metrics.set_workers({place: counts[place] for place in product(sorted(self._pools), MemberState)})
