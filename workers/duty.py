"""What a worker takes on now: its roles, and whether it leaves. It reads both off the membership that it is told.

    READY, roles {decode} ──DRAINING, or roles {prefill}──▶ takes no new streams
                                                            those not begun here go elsewhere at once,
                                                            the others after `handover_s`,
                                                            none while there is nobody to take them;
                                                            streams stay with workers of the same weights

Plain values; engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import Role
from cluster.membership import Member, Membership, MemberState


class Duty:
    """`handover_s`: how long streams may go on where no new ones are taken."""

    def __init__(self, incarnation: str, roles: Iterable[Role], handover_s: float) -> None:
        self.roles = frozenset(roles)
        self.leaving = False
        self._incarnation = incarnation
        self._handover_s = handover_s
        self._hands_over_at: float | None = None
        self._has_heir = self._has_twin = False

    @property
    def decodes(self) -> bool:
        """Whether new streams are taken."""
        return not self.leaving and Role.DECODE in self.roles

    def follow(self, membership: Membership, compatibility_hash: bytes, now: float) -> bool:
        """What the membership says of this worker and of its heirs. Whether anything about itself is new."""
        heirs = [each for each in membership.ready(Role.DECODE) if each.incarnation != self._incarnation]
        self._has_heir = bool(heirs)
        self._has_twin = any(each.compatibility_hash == compatibility_hash for each in heirs)
        me = membership.find(self._incarnation)
        if me is None:
            return False
        before = self.roles, self.leaving
        self.roles = frozenset(me.roles)
        self.leaving |= me.state is MemberState.DRAINING
        self._wind(now)
        return before != (self.roles, self.leaving)

    def leave(self, now: float) -> None:
        """As if the membership had said so."""
        self.leaving = True
        self._wind(now)

    def hands_over(self, now: float) -> tuple[bool, bool]:
        """Whether requests that have not begun here go elsewhere now, and whether streams do."""
        over = self._hands_over_at is not None and now >= self._hands_over_at
        return not self.decodes and self._has_heir, not self.decodes and self._has_twin and over

    def _wind(self, now: float) -> None:
        """The clock of the handover runs from the end of the role."""
        if self.decodes:
            self._hands_over_at = None
        elif self._hands_over_at is None:
            self._hands_over_at = now + self._handover_s


def takes_prompts(member: Member) -> bool:
    """Whether a source takes new prompts, as far as the membership says."""
    return Role.PREFILL in member.roles and member.state is MemberState.READY
