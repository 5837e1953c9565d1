"""What attempts bring beside tokens: each piece once, aligned, and nothing where a piece is missing."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Role
from cluster.protos import worker_pb2 as pb
from cluster.request import Beams, FinishReason, Hypothesis, Pooling, SamplingParams, TokenLogprobs
from router.flight import Flight, Receipt, RouterRequest, State
from router.plan import Candidate, Plan

PROMPT = tuple(range(10, 18))
NUM_TOKENS = 6
BOTH = SamplingParams(max_tokens=NUM_TOKENS, num_logprobs=2, num_prompt_logprobs=1)
EMBEDDING = SamplingParams(pooling=Pooling.MEAN)
SEARCH = SamplingParams(beams=Beams(4, num_returned=3))
LOST = pb.Failure(code=pb.PEER_LOST, message="gone")


def of_token(index: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5 * index, ((index, -0.5 * index), (99, -4.0)))


def of_prompt(index: int) -> TokenLogprobs:
    return TokenLogprobs(-0.25 * index, ((index + 1, -0.25),))


def wires(entries: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [entry.wire() for entry in entries]


def frame(
    attempt: int,
    first: int = 0,
    count: int = 0,
    *,
    prompt: range = range(0),
    num_logprobs: int | None = None,
    finish: pb.FinishReason = pb.FINISH_UNSPECIFIED,
    embedding: bytes = b"",
) -> pb.SequenceTokens:
    """`count` tokens from index `first` on, and logprobs of these prompt tokens."""
    return pb.SequenceTokens(
        key=pb.RequestKey(request_id="r", attempt=attempt),
        first_token_index=first,
        token_ids=[100 + index for index in range(first, first + count)],
        logprobs=wires(of_token(first + i) for i in range(count if num_logprobs is None else num_logprobs)),
        prompt_logprobs=wires(map(of_prompt, prompt)),
        first_prompt_logprob=prompt.start if prompt else 0,
        finish=finish,
        embedding=embedding,
    )


def flight(sampling: SamplingParams = BOTH, prompt: tuple[int, ...] = PROMPT) -> Flight:
    one = Flight(RouterRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, leader_id="leader"))
    place(one)
    return one


def place(one: Flight) -> None:
    worker = Candidate(name="w", incarnation="w", roles=frozenset({Role.DECODE}))
    one.place(Plan(decode=worker, prefill=worker), f"w#{one.attempt + 1}")


def hear(one: Flight, said: pb.SequenceTokens) -> Receipt:
    return one.receive(f"w#{one.attempt}", said)


WHOLE = range(1, len(PROMPT))


def test_prompt_logprobs_come_in_pieces_and_leave_with_the_first_token() -> None:
    one = flight()
    assert hear(one, frame(1, prompt=range(1, 4))) is Receipt.TAKEN
    assert one.take() is None
    assert hear(one, frame(1, prompt=range(2, 8))) is Receipt.TAKEN  # one that repeats some
    assert hear(one, frame(1, 0, 2)) is Receipt.TAKEN
    delta = one.take()
    assert delta is not None and delta.token_ids == (100, 101)
    assert delta.prompt_logprobs == tuple(map(of_prompt, WHOLE))
    assert delta.logprobs == (of_token(0), of_token(1))
    hear(one, frame(1, 1, 3, finish=pb.STOP))
    last = one.take()
    assert last is not None and last.prompt_logprobs == ()
    assert last.logprobs == (of_token(2), of_token(3)) and last.finish is FinishReason.STOP


def test_what_leaves_something_out_is_not_taken() -> None:
    for said in (
        frame(1, prompt=range(2, 8)),  # the first one is missing
        frame(1, prompt=range(1, 9)),  # more than the prompt has
        frame(1, 0, 1, prompt=range(1, 7)),  # a token before the last one of the prompt
        frame(1, 0, 1),
        frame(1, finish=pb.LENGTH),
        frame(1, 0, 2, prompt=WHOLE, num_logprobs=1),
        frame(1, 0, 2, prompt=WHOLE, num_logprobs=0),
        frame(1, 0, 0, prompt=WHOLE, num_logprobs=1),
    ):
        one = flight()
        assert hear(one, said) is Receipt.GAP, said
        assert one.emitted == [] and one.output.prompt_logprobs == []
        assert one.fail_attempt(pb.Failure(code=pb.INTERNAL, message="gap"), 8, reported=False)
    plain = flight(SamplingParams(max_tokens=4))
    assert hear(plain, frame(1, 0, 1)) is Receipt.GAP  # logprobs that nobody asked for
    torn = frame(1, 0, 1, prompt=WHOLE)
    torn.logprobs[0].top_logprobs.pop()
    assert hear(flight(), torn) is Receipt.GAP


def test_a_prompt_of_one_token_has_no_logprobs_to_wait_for() -> None:
    one = flight(prompt=(7,))
    assert hear(one, frame(1, 0, 1)) is Receipt.TAKEN
    delta = one.take()
    assert delta is not None and delta.prompt_logprobs == () and delta.logprobs == (of_token(0),)


def test_a_replay_asks_for_prompt_logprobs_only_while_some_are_missing() -> None:
    one = flight()
    hear(one, frame(1, prompt=range(1, 5)))
    one.fail_attempt(LOST, 8, reported=False)
    place(one)
    asked = one.submit(b"root" * 4, 4, 0)
    assert asked.sampling.HasField("num_prompt_logprobs") and asked.leader_id == "leader"
    assert hear(one, frame(2, prompt=WHOLE)) is Receipt.TAKEN
    hear(one, frame(2, 0, 1))
    one.fail_attempt(LOST, 8, reported=False)
    place(one)
    asked = one.submit(b"root" * 4, 4, 0)
    assert not asked.sampling.HasField("num_prompt_logprobs") and asked.sampling.num_logprobs == 2
    assert hear(one, frame(3, 1, 1)) is Receipt.TAKEN
    delta = one.take()
    assert delta is not None
    assert (delta.logprobs, delta.prompt_logprobs) == ((of_token(0), of_token(1)), tuple(map(of_prompt, WHOLE)))


def test_an_embedding_comes_with_the_finish() -> None:
    values = (0.5, -2.0, 1e-3)
    one = flight(EMBEDDING)
    assert not one.fail_attempt(pb.Failure(code=pb.INVALID, message="no"), 8, reported=True)
    for wrong in (b"", b"12345"):
        assert hear(flight(EMBEDDING), frame(1, finish=pb.STOP, embedding=wrong)) is Receipt.GAP
    one = flight(EMBEDDING)
    one.fail_attempt(LOST, 8, reported=False)
    place(one)
    assert hear(one, frame(2, finish=pb.STOP, embedding=struct.pack("<3f", *values))) is Receipt.TAKEN
    delta = one.take()
    assert delta is not None and (delta.token_ids, delta.finish) == ((), FinishReason.STOP)
    assert struct.pack("<3f", *delta.embedding) == struct.pack("<3f", *values)


def test_what_a_search_found_comes_with_the_finish() -> None:
    found = [Hypothesis((7, 8), -0.5, FinishReason.STOP), Hypothesis((7, 9, 9), -0.75, FinishReason.LENGTH)]

    def told(attempt: int, *hypotheses: pb.Hypothesis, count: int = 0) -> pb.SequenceTokens:
        tokens = frame(attempt, count=count, num_logprobs=0, finish=pb.STOP)
        tokens.hypotheses.extend(hypotheses)
        return tokens

    wires = [each.wire() for each in found]
    broken = pb.Hypothesis(token_ids=[1], score=0.0, finish=pb.FINISH_UNSPECIFIED)
    for wrong in (told(1), told(1, *wires, *wires), told(1, broken), told(1, wires[0], count=1)):
        assert hear(flight(SEARCH), wrong) is Receipt.GAP
    one = flight(SEARCH)
    assert one.fail_attempt(LOST, 8, reported=False), "nothing was emitted: another worker begins anew"
    place(one)
    assert hear(one, told(2, *wires)) is Receipt.TAKEN
    delta = one.take()
    assert delta is not None and (delta.token_ids, delta.finish) == ((), FinishReason.STOP)
    assert list(delta.hypotheses) == found


def test_an_embedding_is_tried_again_whatever_max_tokens_says() -> None:
    one = flight(SamplingParams(max_tokens=0, pooling=Pooling.LAST))
    assert one.fail_attempt(LOST, 8, reported=False) and one.finish is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["say"] * 6 + ["lost", "read"]),
            st.integers(-3, 1),  # offset of the first token
            st.integers(0, 3),  # tokens
            st.integers(-3, 1),  # offset of the first prompt logprob
            st.integers(0, 5),  # prompt logprobs
            st.integers(-1, 0),  # logprobs too few
        ),
        max_size=40,
    )
)
def test_logprobs_stay_beside_their_tokens(script: list[tuple[str, int, int, int, int, int]]) -> None:
    one = flight()
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt: list[TokenLogprobs] = []

    def read() -> None:
        if (delta := one.take()) is not None:
            assert delta.first_index == len(token_ids) == len(logprobs)
            token_ids.extend(delta.token_ids)
            logprobs.extend(delta.logprobs)
            prompt.extend(delta.prompt_logprobs)

    for kind, offset, count, prompt_offset, num_prompt, too_few in script:
        if one.state is not State.RUNNING:
            break
        known, prompt_known = len(one.emitted), len(one.output.prompt_logprobs)
        if kind == "read":
            read()
        elif kind == "lost":
            if one.fail_attempt(LOST, 99, reported=False):  # otherwise every token had come
                place(one)
        else:
            first = max(0, known + offset)
            start = max(1, 1 + prompt_known + prompt_offset)
            piece = range(start, min(start + num_prompt, len(PROMPT)))
            last = min(first + count, NUM_TOKENS)
            count = max(0, last - first)
            said = frame(one.attempt, first, count, prompt=piece, num_logprobs=max(0, count + too_few))
            if hear(one, said) is Receipt.GAP:
                assert (len(one.emitted), len(one.output.prompt_logprobs)) == (known, prompt_known)
                assert (
                    first > known
                    or (piece and start > prompt_known + 1)
                    or count + too_few != count
                    or (last > known and max(prompt_known, piece.stop - 1) < len(WHOLE))
                )
    read()
    assert token_ids == list(range(100, 100 + len(token_ids)))
    assert logprobs == [of_token(index) for index in range(len(token_ids))]
    assert prompt == ([of_prompt(index) for index in WHOLE] if token_ids else [])
