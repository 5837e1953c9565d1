"""One flight, without sockets: whatever attempts repeat, leave out or break, each index arrives once, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Role
from cluster.errors import Busy, InvalidRequest, WorkerFailed
from cluster.hashing import block_hashes, chain_root, split
from cluster.hidden_states import HiddenStates
from cluster.protos import worker_pb2 as pb
from cluster.request import FinishReason, Pooling, SamplingParams
from router.flight import MAX_UNREAD_TOKENS, Flight, Receipt, RouterRequest, State
from router.plan import Candidate, Plan

MAX_ATTEMPTS = 8


def flight(max_tokens: int = 8, prompt: tuple[int, ...] = (1, 2, 3)) -> Flight:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(99,))
    return Flight(RouterRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling))


def plan_on(name: str) -> Plan:
    worker = Candidate(name=name, incarnation=name, roles=frozenset({Role.DECODE}))
    return Plan(decode=worker, prefill=worker)


def tokens(
    attempt: int, first: int, ids: list[int], finish: pb.FinishReason = pb.FINISH_UNSPECIFIED
) -> pb.SequenceTokens:
    key = pb.RequestKey(request_id="r", attempt=attempt)
    return pb.SequenceTokens(key=key, first_token_index=first, token_ids=ids, finish=finish)


def lost(code: pb.ErrorCode = pb.PEER_LOST) -> pb.Failure:
    return pb.Failure(code=code, message="gone")


@st.composite
def frames(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """(kind, attempt offset, index offset, count): what workers send and what happens to them."""
    kinds = st.sampled_from(["tokens"] * 6 + ["lost", "read"])
    return draw(st.lists(st.tuples(kinds, st.integers(-1, 0), st.integers(-3, 1), st.integers(0, 4)), max_size=40))


@given(frames())
def test_each_index_is_delivered_once_and_in_order(script: list[tuple[str, int, int, int]]) -> None:
    one = flight(max_tokens=10)
    delivered: list[int] = []

    def read() -> None:
        delta = one.take()
        if delta is not None:
            assert delta.first_index == len(delivered)
            delivered.extend(delta.token_ids)

    one.place(plan_on("w"), "w#1")
    for kind, attempt_offset, index_offset, count in script:
        if one.state is not State.RUNNING:
            break
        session = f"w#{one.attempt}"
        if kind == "lost":
            if one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False):  # the same worker, dialed again
                one.place(plan_on("w"), f"w#{one.attempt + 1}")
        elif kind == "read":
            read()
        else:
            known = len(one.emitted)
            first = max(0, known + index_offset)
            last = min(first + count, 10)
            finish = pb.LENGTH if last == 10 else pb.FINISH_UNSPECIFIED
            attempt = one.attempt + attempt_offset
            receipt = one.receive(session, tokens(attempt, first, list(range(100 + first, 100 + last)), finish))
            if attempt_offset:
                assert receipt is Receipt.OLD_ATTEMPT and len(one.emitted) == known
            elif first > known:
                assert receipt is Receipt.GAP and len(one.emitted) == known
            else:
                assert len(one.emitted) == max(known, last)
    read()
    assert delivered == one.emitted == list(range(100, 100 + len(delivered)))
    assert (one.finish is not None) == (one.state is State.ENDED and one.error is None)


def test_a_finish_with_repeated_tokens_counts() -> None:
    one = flight()
    one.place(plan_on("w"), "s")
    assert one.receive("s", tokens(1, 0, [5, 6])) is Receipt.TAKEN
    assert one.receive("s", tokens(1, 1, [6], pb.STOP)) is Receipt.REPEATED
    delta = one.take()
    assert delta is not None and delta.token_ids == (5, 6) and delta.finish is FinishReason.STOP
    assert one.take() is None


def test_tokens_of_another_session_are_old() -> None:
    one = flight()
    one.place(plan_on("w"), "s")
    assert one.receive("other", tokens(1, 0, [5])) is Receipt.OLD_ATTEMPT
    assert one.emitted == []


def test_a_client_that_does_not_read_is_bounded() -> None:
    one = flight(max_tokens=1 << 20)
    one.place(plan_on("w"), "s")
    assert one.receive("s", tokens(1, 0, [1] * MAX_UNREAD_TOKENS)) is Receipt.TAKEN
    assert one.receive("s", tokens(1, MAX_UNREAD_TOKENS, [1])) is Receipt.UNREAD


def test_a_request_that_kills_two_workers_is_not_tried_on_a_third() -> None:
    one = flight()
    one.place(plan_on("a"), "s1")
    assert one.fail_attempt(lost(), MAX_ATTEMPTS, reported=False)
    one.place(plan_on("b"), "s2")
    assert not one.is_suspected
    assert one.fail_attempt(lost(pb.INTERNAL), MAX_ATTEMPTS, reported=True)
    assert one.is_suspected, "until it is known that the first one lives"
    assert "request r failed on 2 workers" in str(one.poisonous())
    one.suspects.discard("a")
    assert not one.is_suspected
    one.place(plan_on("c"), "s3")
    assert not one.fail_attempt(lost(pb.INTERNAL), MAX_ATTEMPTS, reported=True)
    assert isinstance(one.error, WorkerFailed)
    assert "request r failed on 2 workers" in str(one.error)


def test_a_request_under_which_two_sources_died_is_not_tried_again() -> None:
    """The decode worker lives and says so; asking another would kill two more sources."""
    one = flight()
    one.place(plan_on("a"), "s1")
    assert not one.fail_attempt(lost(), MAX_ATTEMPTS, reported=True)
    assert isinstance(one.error, WorkerFailed)
    assert "request r failed on 2 workers" in str(one.error)


def test_the_same_worker_lost_again_is_one_death() -> None:
    one = flight()
    for attempt in range(1, 4):
        one.place(plan_on("a"), f"s{attempt}")
        assert one.fail_attempt(lost(), 4, reported=False)
    one.place(plan_on("a"), "s4")
    assert not one.fail_attempt(lost(), 4, reported=False)  # but attempts are bounded
    assert isinstance(one.error, WorkerFailed) and "after 4 attempts" in str(one.error)


def test_being_turned_away_is_no_death_and_ends_in_busy() -> None:
    one = flight()
    for name in ("a", "b"):
        one.place(plan_on(name), name)
        assert one.fail_attempt(lost(pb.BUSY), 3, reported=True)
    one.place(plan_on("c"), "c")
    assert not one.fail_attempt(lost(pb.BUSY), 3, reported=True)
    assert isinstance(one.error, Busy)
    assert one.excluded == {"a", "b", "c"}


def test_a_request_that_is_wrong_is_not_tried_again() -> None:
    one = flight()
    one.place(plan_on("a"), "s")
    assert not one.fail_attempt(pb.Failure(code=pb.INVALID, message="7 is odd"), 3, reported=True)
    assert isinstance(one.error, InvalidRequest) and str(one.error) == "7 is odd"


def test_a_loss_after_the_last_token_ends_well() -> None:
    one = flight(max_tokens=2)
    one.place(plan_on("a"), "s")
    one.receive("s", tokens(1, 0, [5, 6]))
    assert not one.fail_attempt(lost(), 3, reported=False)
    assert one.error is None and one.finish is FinishReason.LENGTH
    stopped = flight()
    stopped.place(plan_on("a"), "s")
    stopped.receive("s", tokens(1, 0, [5, 99]))
    assert not stopped.fail_attempt(lost(), 3, reported=False)
    assert stopped.error is None and stopped.finish is FinishReason.STOP


def test_the_hash_chain_grows_with_what_was_emitted() -> None:
    one = flight(prompt=tuple(range(10)))
    root = chain_root(b"h" * 16)
    one.place(plan_on("a"), "s")
    first = one.submit(root, 4, 0)
    assert split(first.block_hashes) == block_hashes(root, range(10), 4)
    one.receive("s", tokens(1, 0, [20, 21, 22]))
    one.fail_attempt(lost(), 3, reported=False)
    one.place(plan_on("b"), "t")
    second = one.submit(root, 4, 1500)
    assert split(second.block_hashes) == block_hashes(root, [*range(10), 20, 21, 22], 4)
    assert (list(second.emitted_token_ids), second.key.attempt, second.deadline_ms) == ([20, 21, 22], 2, 1500)
    one.fail_attempt(pb.Failure(code=pb.BUSY), 9, reported=True)
    one.place(plan_on("c"), "u")
    other = chain_root(b"i" * 16)  # another set of workers: another chain
    assert split(one.submit(other, 4, 0).block_hashes) == block_hashes(other, [*range(10), 20, 21, 22], 4)


def test_hidden_states_and_the_last_frame_come_in_any_order() -> None:
    """Those of the running attempt, and of as many tokens as were sent; the others change nothing."""
    request = RouterRequest(
        request_id="r",
        prompt_token_ids=(1,),
        encoder_token_ids=(5, 6),
        sampling=SamplingParams(max_tokens=1, pooling=Pooling.STATES),
    )
    states, longer = HiddenStates(2, 1, bytes(8)), HiddenStates(3, 1, bytes(12))
    last = tokens(1, 0, [], pb.STOP)
    for states_first in (True, False):
        one = Flight(request)
        one.place(plan_on("w"), "w#1")
        assert not one.bring("w#1", 1, longer) and not one.bring("w#1", 0, states) and not one.bring("v#1", 1, states)
        if states_first:
            assert one.bring("w#1", 1, states) and one.take() is None
        assert one.receive("w#1", last) is Receipt.TAKEN
        if not states_first:
            assert one.take() is None and one.bring("w#1", 1, states)
        delta = one.take()
        assert delta is not None and delta.states == states and delta.finish is FinishReason.STOP
        assert one.state is State.ENDED and not one.bring("w#1", 1, states)

    lonely = Flight(request)
    lonely.place(plan_on("w"), "w#1")
    lonely.receive("w#1", last)
    assert lonely.fail_attempt(lost(), MAX_ATTEMPTS, reported=False), "its states were lost with the session"
    lonely.place(plan_on("v"), "v#1")
    assert lonely.bring("v#1", 2, states) and lonely.take() is None, (
        "a last frame of the first attempt ended the second"
    )
    assert lonely.receive("v#1", tokens(2, 0, [], pb.STOP)) is Receipt.TAKEN and lonely.state is State.ENDED
