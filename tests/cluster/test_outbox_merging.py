"""Logprobs of prompts in waiting tokens: merged where they go on, apart where they do not, and large ones in parts."""

from __future__ import annotations

from cluster.outbox import Outbox
from cluster.parts import MAX_FRAME_BYTES, Assembler
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey, TokenLogprobs

KEY = RequestKey("a", 0)
MIB = 1 << 20


def outbox() -> Outbox:
    def refuse(told: object) -> None:
        raise AssertionError(told)

    return Outbox(lambda: None, refuse, refuse, max_bytes=16 * MIB, max_request_bytes=MIB, max_frames=100)


def piece(first: int, count: int, *tokens: int, num_top: int = 0) -> pb.SequenceTokens:
    """Logprobs of prompt tokens first … first + count − 1, and the first tokens."""
    top = tuple((100_000 + token, -1.5) for token in range(num_top))
    return pb.SequenceTokens(
        key=KEY.wire(),
        token_ids=tokens,
        prompt_logprobs=[TokenLogprobs(-float(index), top).wire() for index in range(first, first + count)],
        first_prompt_logprob=first if count else 0,
    )


def drain(box: Outbox) -> list[pb.SequenceTokens]:
    """What arrives; every frame is small."""
    assembler, sequences = Assembler(), list[pb.SequenceTokens]()
    while (data := box.take()) is not None:
        assert len(data) <= MAX_FRAME_BYTES
        frame = pb.Frame.FromString(data)
        if frame.HasField("part"):
            whole = assembler.add(frame.part)
            if whole is None:
                continue
            frame = pb.Frame.FromString(whole)
        sequences.extend(frame.step_tokens.sequences)
    return sequences


def test_pieces_that_go_on_are_one() -> None:
    box = outbox()
    for said in (piece(1, 3), piece(4, 2), piece(6, 0, 7)):
        box.put_tokens(1, [said])
    (merged,) = drain(box)
    assert (merged.first_prompt_logprob, list(merged.token_ids)) == (1, [7])
    assert [entry.logprob for entry in merged.prompt_logprobs] == [-1, -2, -3, -4, -5]


def test_pieces_that_do_not_go_on_stay_apart() -> None:
    box = outbox()
    for said in (piece(1, 3), piece(1, 2), piece(9, 1)):
        box.put_tokens(1, [said])
    assert [(s.first_prompt_logprob, len(s.prompt_logprobs)) for s in drain(box)] == [(1, 3), (1, 2), (9, 1)]


def test_a_piece_after_bare_tokens_keeps_its_index() -> None:
    box = outbox()
    box.put_tokens(1, [piece(0, 0)])
    box.put_tokens(2, [piece(5, 2, 8)])
    (merged,) = drain(box)
    assert (merged.first_prompt_logprob, len(merged.prompt_logprobs), list(merged.token_ids)) == (5, 2, [8])


def test_the_best_twenty_of_a_prompt_of_4096_tokens_fit_whatever_the_chunk() -> None:
    for chunk in (512, 4096):
        box = outbox()
        said = [piece(first, min(chunk, 4096 - first), num_top=20) for first in range(1, 4096, chunk)]
        for each in said:
            box.put_tokens(1, [each])
        box.put_tokens(2, [piece(0, 0, 7)])
        assert [*said, piece(0, 0, 7)] == drain(box)
