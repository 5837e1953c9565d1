"""Which worker reads an encoder input."""

from __future__ import annotations

from dataclasses import replace

from cluster.config import Role
from cluster.protos import worker_pb2 as pb
from router.encode import EncoderDemand, is_read_apart, with_encode
from router.plan import Candidate, Plan

HASH = b"h" * 16


def worker(name: str, role: Role, *warm: str, queued: int = 0, connected: bool = True) -> Candidate:
    return Candidate(
        name=name,
        incarnation=name,
        roles=frozenset({role}),
        compatibility_hash=HASH,
        connected=connected,
        queued_encoder_tokens=queued,
        warm_sources=dict.fromkeys(warm, 1e9),
    )


ENCODERS = [worker(f"encode-{index}", Role.ENCODE) for index in range(4)]
NAMES = [each.name for each in ENCODERS]
PREFILL = worker("prefill-0", Role.PREFILL, *NAMES)
DECODE = worker("decode-0", Role.DECODE, "prefill-0", *NAMES)
PLAN = Plan(decode=DECODE, prefill=PREFILL)


def chosen(name: str, encoders: list[Candidate] = ENCODERS, plan: Plan = PLAN, num_tokens: int = 100) -> Plan:
    return with_encode(plan, [plan.decode, plan.prefill, *encoders], EncoderDemand(name, num_tokens))


def first(name: str, encoders: list[Candidate] = ENCODERS, num_tokens: int = 100) -> str:
    plan = chosen(name, encoders, num_tokens=num_tokens)
    assert plan.encode is not None
    return plan.encode.name


def test_equal_inputs_meet_and_others_spread() -> None:
    homes = {f"{index}": first(f"{index}") for index in range(200)}
    assert homes == {name: first(name) for name in homes}
    assert set(homes.values()) == set(NAMES)
    left = {name: first(name, ENCODERS[1:]) for name in homes}
    assert all(left[name] == home for name, home in homes.items() if home != "encode-0"), "only its own move"


def test_a_home_with_more_to_do_than_the_input_is_left() -> None:
    home = first("x")
    for queued, stays in ((100, True), (101, False)):
        busy = [each._replace(queued_encoder_tokens=queued * (each.name == home)) for each in ENCODERS]
        assert (first("x", busy) == home) is stays
    plan = chosen("x")
    assert plan.encode_spare is not None and plan.encode_spare.name != home


def test_who_runs_the_decoder_must_be_able_to_read() -> None:
    blind = replace(PLAN, prefill=worker("prefill-0", Role.PREFILL, "encode-2"))
    assert [each and each.name for each in (chosen("x", plan=blind).encode, chosen("x", plan=blind).encode_spare)] == [
        "encode-2",
        None,
    ]
    gone = [each._replace(connected=False) for each in ENCODERS]
    other = [each._replace(compatibility_hash=b"o" * 16) for each in ENCODERS]
    for encoders in ([], gone, other):
        assert chosen("x", encoders).encode == PREFILL, "who computes the prompt reads its input, too"
    spare = worker("prefill-1", Role.PREFILL)
    assert chosen("x", [], replace(PLAN, spare=spare)).encode_spare == spare
    demand, home = EncoderDemand("x", 100), first("x")
    avoiding = with_encode(PLAN, [DECODE, PREFILL, *ENCODERS], demand, {home})
    assert avoiding.encode is not None and avoiding.encode.name != home
    nobody = with_encode(PLAN, [DECODE, PREFILL, *ENCODERS], demand, set(NAMES))
    assert nobody.encode is not None and nobody.encode.name == home


def test_whether_an_encode_worker_is_within_reach() -> None:
    assert is_read_apart(PLAN, [DECODE, PREFILL, ENCODERS[0]])
    assert not is_read_apart(PLAN, [DECODE, PREFILL])
    assert not is_read_apart(PLAN, [DECODE, PREFILL, worker("encode-9", Role.ENCODE)]), "nobody has a warm pair with it"
    mixed = worker("mixed-0", Role.DECODE)._replace(roles=frozenset(Role))
    assert is_read_apart(Plan(decode=mixed, prefill=mixed), [mixed])


def test_the_plan_in_words() -> None:
    stages = chosen("x").wire().stages
    assert [stage.stage for stage in stages] == [pb.ENCODE, pb.PREFILL, pb.DECODE]
    assert stages[0].worker.name == first("x") and stages[0].spare.name in NAMES
    assert [stage.stage for stage in PLAN.wire().stages] == [pb.PREFILL, pb.DECODE]
