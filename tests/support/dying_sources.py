"""Sources that are killed, or freeze, while a sink reads from them: the sink lives, and so does its device."""

from __future__ import annotations

import os
import signal
from collections import Counter
from random import Random

from kvtransfer.connector import Outcome, ReadLimits
from kvtransfer.layout import KvGeometry
from kvtransfer.transport import TransportKind
from tests.support.kv_process import RankProcess

_TOGETHER = 8  # processes that start side by side
_NUM_PULLS = 24
_LIMITS = ReadLimits(30.0, 2.0)


def outcomes_of_deaths(
    number: signal.Signals,
    num_deaths: int,
    geometry: KvGeometry,
    *,
    transport: TransportKind,
    devices: tuple[str, str] = ("cpu", "cpu"),
    num_blocks: int = 160,
) -> Counter[Outcome]:
    """Of the pulls that were under way, as they ended or were given up first. `devices`: of sources and sink.

    Each source gets `number` under 24 pulls of nearly all its blocks, after none to three of them. After each, what the
    sink pulls from a living source is compared, and all destinations of the dead one are over.
    """
    random = Random(1)
    names = [f"source-{index}" for index in range(num_deaths)]
    sink = RankProcess("sink", geometry, num_blocks, device=devices[1], transport=transport, limits=_LIMITS)
    spare = RankProcess("spare", geometry, 4, device=devices[0], transport=transport)
    outcomes: Counter[Outcome] = Counter()
    blocks = list(range(1, num_blocks - 9))
    with sink, spare:
        assert sink.connect(spare).transport == transport
        while names:
            together, names = names[:_TOGETHER], names[_TOGETHER:]
            sources = [
                RankProcess(name, geometry, num_blocks, device=devices[0], transport=transport) for name in together
            ]
            for source in sources:
                with source:
                    assert sink.connect(source).error is None
                    for pull in range(_NUM_PULLS):
                        sink.submit(source, blocks, blocks, [0] * len(blocks), id=pull + 1)
                    seen = [sink.done().outcome for _ in range(random.randrange(4))]
                    assert source.process.pid is not None
                    os.kill(source.process.pid, number)
                    seen += [sink.done().outcome for _ in range(_NUM_PULLS - len(seen))]
                    os.kill(source.process.pid, signal.SIGKILL)  # a frozen one, too
                    later = [sink.done().outcome for _ in range(seen.count(Outcome.STUCK))]
                    assert set(later) <= {Outcome.LOST}
                    assert set(seen) <= {Outcome.OK, Outcome.LOST, Outcome.STUCK}
                    outcomes.update(seen)
                    sink.disconnect(source)
                    generation = outcomes.total()
                    spare.write([1, 2], [generation, generation + 1], generation)
                    last = num_blocks - 2
                    assert sink.pull(spare, [2, 1], [last, last + 1], [generation] * 2).outcome is Outcome.OK
                    assert sink.read([last, last + 1], [generation + 1, generation]) == [True, True]
        assert sink.stop() == 0
    return outcomes
