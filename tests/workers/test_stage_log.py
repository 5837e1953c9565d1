"""Stages are told when they begin and when they end, each once; of a request that is not traced nothing is kept."""

from __future__ import annotations

from cluster.protos import worker_pb2 as pb
from workers.stage_log import StageLog

ME = pb.WorkerRef(name="decode-0", incarnation="d")
SOURCE, SPARE = pb.Identity(name="prefill-0", incarnation="p"), pb.Identity(name="prefill-1", incarnation="q")
RUN = pb.BlockRun(block_ids=[1, 2], generations=[1, 1])


def news(log: StageLog) -> list[tuple[int, str, str, bool]]:
    """(number, kind, worker, has ended) of what is told."""
    return [
        (each.number, pb.StageKind.Name(each.kind), each.worker.name, each.HasField("ended_s")) for each in log.take()
    ]


def through_a_source(log: StageLog) -> None:
    log.asked(SOURCE, 100, 11.0)
    log.ticket(pb.Ticket(runs=[RUN], pid=7), 11.5)
    log.reading(SOURCE, "nixl", 11.5)
    log.read(2, 2000, 0.0)
    log.ticket(pb.Ticket(runs=[RUN], pid=7, last=True, prefix_hit_tokens=16, queue_s=0.1, compute_s=0.8), 12.0)


def test_a_stage_is_told_when_it_begins_and_when_it_ends() -> None:
    log = StageLog(ME, 10.0, on=True)
    through_a_source(log)
    prefill, transfer = log.take()
    assert (prefill.began_s, prefill.ended_s, prefill.tokens, prefill.chunks, prefill.blocks) == (1.0, 2.0, 100, 2, 4)
    assert (prefill.prefix_hit_tokens, prefill.queue_s, prefill.compute_s, prefill.pid) == (16, 0.1, 0.8, 7)
    assert transfer.began_s == 1.5 and not transfer.HasField("ended_s") and not log.take()
    log.reading(SOURCE, "nixl", 12.0)
    log.read(1, 1000, 0.25)
    log.arrived(12.5)
    log.emitted(12.5, 13.0, 0)
    log.emitted(13.0, 13.5, 0)
    transfer, decode = log.take()
    assert (transfer.number, transfer.ended_s, transfer.blocks, transfer.bytes, transfer.read_s) == (
        2,
        2.5,
        3,
        3000,
        0.25,
    )
    assert (decode.began_s, decode.worker.name) == (2.5, "decode-0") and not decode.HasField("ended_s")
    log.close(14.0, "it broke")
    (decode,) = log.take()
    assert (decode.ended_s, decode.error) == (4.0, "it broke")


def test_a_source_that_is_lost_is_followed_by_another_or_by_the_own_engine() -> None:
    log = StageLog(ME, 10.0, on=True)
    log.asked(SOURCE, 100, 10.0)
    log.reading(SOURCE, "nixl", 10.5)
    log.lost("gone", 11.0)
    log.asked(SPARE, 100, 11.0)
    told = log.take()
    assert [each.error for each in told] == ["gone", "gone", ""]
    assert [each.worker.name for each in told] == ["prefill-0", "prefill-0", "prefill-1"]
    log.lost("gone too", 12.0)
    log.compute_here()
    log.computed(64, 12.5)
    log.computed(100, 13.0)
    log.emitted(13.0, 13.5, 32)
    assert [each.error for each in log.take()] == ["gone too", "", ""]
    log.preempted(14.0)
    log.computed(101, 15.0)
    log.emitted(15.0, 15.5, 0)
    assert news(log) == [
        (5, "DECODING", "decode-0", True),
        (6, "PREFILLING", "decode-0", True),
        (7, "DECODING", "decode-0", False),
    ]


def test_after_a_pull_the_own_engine_computes_no_prompt() -> None:
    """Neither the first time nor, after a preemption, when a source is asked again."""
    log = StageLog(ME, 10.0, on=True)
    for _ in range(2):
        through_a_source(log)
        log.arrived(12.5)
        log.computed(101, 12.5)
        log.emitted(12.5, 13.0, 0)
        log.preempted(14.0)
    assert [kind for _, kind, _, _ in news(log)] == ["PREFILLING", "TRANSFERRING", "DECODING"] * 2


def test_an_encoder_elsewhere() -> None:
    log = StageLog(ME, 10.0, on=True)
    log.encoding(10.5)
    log.encoding(10.7)
    log.encoded(pb.Encoded(encode=pb.WorkerRef(name="encode-0"), tokens=40, blocks=5, bytes=500), 11.0, "")
    log.encoded(None, 12.0, "twice")
    (told,) = log.take()
    assert (told.began_s, told.ended_s, told.worker.name, told.error) == (0.5, 1.0, "encode-0", "")
    assert (told.tokens, told.blocks, told.bytes) == (40, 5, 500)


def test_what_is_not_traced_is_not_kept() -> None:
    log = StageLog(ME, 10.0, on=False)
    through_a_source(log)
    log.encoding(12.0)
    log.compute_here()
    log.computed(64, 12.0)
    log.emitted(12.0, 12.5, 0)
    log.preempted(13.0)
    log.computed(64, 13.0)
    log.close(14.0, "over")
    assert log.take() == ()
