"""What a worker tells of its load: to the router in frames, to Prometheus as gauges. The same figures."""

from __future__ import annotations

from typing import Final

from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from workers.assembly import Assembly
from workers.decode import DecodeStage
from workers.encode import EncodeStage
from workers.pairs import Pairs

REPORT_S: Final = 0.1  # between two load reports, where there is news
REPEAT_S: Final = 0.5  # where there is none


class LastReport:
    """What the routers were told last: a worker with nothing to do repeats itself only now and then."""

    def __init__(self) -> None:
        self._report: pb.LoadReport | None = None
        self._looked_at = self._told_at = 0.0

    def is_due(self, now: float) -> bool:
        """Whether another one is to be made."""
        return now - self._looked_at >= REPORT_S

    def is_news(self, report: pb.LoadReport, now: float) -> bool:
        """Whether it is to be told; it counts as told then. What a router counted since on its own (requests that never
        came here) a repetition corrects."""
        self._looked_at = now
        if report == self._report and now - self._told_at < REPEAT_S:
            return False
        self._report, self._told_at = report, now
        return True

    def forget(self) -> None:
        """Somebody new listens, or must hear at once: another one is due, and it is news."""
        self._report, self._looked_at = None, 0.0


def load_report(
    parts: Assembly,
    decode: DecodeStage,
    encode: EncodeStage,
    pairs: Pairs,
    metrics: Metrics,
    *,
    draining: bool,
    last_event_id: int,
    prefill_tokens_per_s: float,
) -> pb.LoadReport:
    """Engine thread. Sets the gauges, too."""
    scheduler, ledger = parts.scheduler, parts.ledger
    groups: list[pb.GroupLoad] = []
    for index, group in enumerate(parts.blocks.groups):
        counts = parts.blocks.counts(index)._asdict()
        groups.append(pb.GroupLoad(name=group.name, num_blocks=group.num_blocks, **counts))
        metrics.set_blocks(group.name, counts)
    num_waiting = scheduler.num_waiting + decode.num_pending
    metrics.waiting.set(num_waiting)
    metrics.running.set(scheduler.num_running)
    metrics.pulling.set(scheduler.num_pulling)
    metrics.leases.set(ledger.num_leases)
    metrics.leased_blocks.set(ledger.num_leased_blocks)
    for side, num_blocks in ledger.take_quarantined()._asdict().items():
        metrics.quarantines.labels(side).inc(num_blocks)
    return pb.LoadReport(
        num_waiting=num_waiting,
        num_running=scheduler.num_running,
        num_pulling=scheduler.num_pulling,
        queued_prefill_tokens=scheduler.queued_prefill_tokens,
        queued_encoder_tokens=encode.num_queued_tokens,
        groups=groups,
        num_leases=ledger.num_leases,
        draining=draining,
        num_steps=parts.engine.num_steps,
        pairs=pairs.reports(),
        last_event_id=last_event_id,
        block_bytes=parts.block_bytes,
        prefill_tokens_per_s=prefill_tokens_per_s,
    )


def counters(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and labels, `name|label=value`; no buckets."""
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for sample in samples
        if "_bucket" not in sample.name and "_created" not in sample.name
    }
