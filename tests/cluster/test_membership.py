import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Role
from cluster.membership import Diff, Member, Membership, MemberState, Rank, diff

members = st.builds(
    Member,
    name=st.sampled_from(["prefill-0", "prefill-1", "decode-0", "mixed-0"]),
    pool=st.sampled_from(["prefill", "decode", "mixed"]),
    incarnation=st.uuids().map(lambda u: u.hex),
    address=st.sampled_from(["", "127.0.0.1:20000", "[::1]:20001"]),
    metrics_address=st.sampled_from(["", "127.0.0.1:20002", "[::1]:20003"]),
    roles=st.lists(st.sampled_from(list(Role)), unique=True).map(tuple),
    ranks=st.lists(st.builds(Rank, rank=st.integers(0, 7), shard=st.integers(0, 3)), max_size=3).map(tuple),
    compatibility_hash=st.binary(max_size=16),
    pid=st.integers(0, 2**22),
    state=st.sampled_from(list(MemberState)),
)
memberships = st.builds(
    Membership,
    version=st.integers(0, 2**40),
    members=st.lists(members, max_size=4, unique_by=lambda m: m.incarnation).map(tuple),
)


def member(name: str, incarnation: str, state: MemberState = MemberState.READY) -> Member:
    pool = name.partition("-")[0]
    return Member(name=name, pool=pool, incarnation=incarnation, address="h:1", roles=(Role(pool),), state=state)


@given(memberships)
def test_the_wire_form_keeps_everything(membership: Membership) -> None:
    assert Membership.from_wire(membership.to_wire()) == membership


def test_the_wire_form_may_grow() -> None:
    tree = json.loads(Membership(3, (member("decode-0", "a"),)).to_wire())
    tree["later"] = tree["members"][0]["later"] = 1
    assert Membership.from_wire(json.dumps(tree).encode()) == Membership(3, (member("decode-0", "a"),))


def test_a_worker_of_an_older_release_exports_nothing() -> None:
    tree = json.loads(Membership(3, (member("decode-0", "a"),)).to_wire())
    del tree["members"][0]["metrics_address"]
    assert Membership.from_wire(json.dumps(tree).encode()).members[0].metrics_address == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04N.",
        b"[]",
        b"{}",
        b'{"version":1,"members":[{}]}',
        b'{"version":1,"members":[3]}',
        Membership(1, (member("decode-0", "a"),)).to_wire().replace(b'"ready"', b'"odd"'),
        Membership(1, (member("decode-0", "a"),)).to_wire().replace(b'"a"', b"7"),
        Membership(1, (member("decode-0", "a"), member("decode-1", "b"))).to_wire().replace(b'"b"', b'"a"'),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Membership.from_wire(data)


@given(memberships, memberships)
def test_diff_leads_from_one_to_the_other(old: Membership, new: Membership) -> None:
    change = diff(old, new)
    alive = {m.incarnation: m for m in old.members if m.state is not MemberState.GONE}
    for left in change.left:
        del alive[left.incarnation]
    for before, after in change.changed:
        assert alive[before.incarnation] == before
        alive[after.incarnation] = after
    for joined in change.joined:
        assert alive.setdefault(joined.incarnation, joined) is joined
    assert alive == {m.incarnation: m for m in new.members if m.state is not MemberState.GONE}
    assert diff(new, new) == Diff((), (), ())


def test_a_restart_is_left_and_joined() -> None:
    old, new = Membership(1, (member("decode-0", "a"),)), Membership(2, (member("decode-0", "b"),))
    assert diff(old, new) == Diff(joined=new.members, left=old.members, changed=())


def test_gone_is_left() -> None:
    old = Membership(1, (member("decode-0", "a"),))
    assert diff(old, Membership(2, (member("decode-0", "a", MemberState.GONE),))).left == old.members


def test_only_ready_members_of_the_role_take_requests() -> None:
    everyone = Membership(1, tuple(member("decode-0", state, state) for state in MemberState))
    assert [m.state for m in everyone.ready(Role.DECODE)] == [MemberState.READY]
    assert everyone.ready(Role.PREFILL) == ()
    assert everyone.find("ready") == everyone.ready(Role.DECODE)[0]
    assert everyone.find("nobody") is None


def test_the_version_rises_only_with_a_change() -> None:
    one, two = member("decode-0", "a"), member("prefill-0", "b")
    first = Membership().next([two, one])
    assert (first.version, first.members) == (1, (one, two))
    assert first.next([one, two]) is first
    drained = first.next([one, dataclasses.replace(two, state=MemberState.DRAINING)])
    assert drained.version == 2
    assert diff(first, drained).changed[0].after.state is MemberState.DRAINING
