"""What holds between any two ranks, over whatever transport: bytes, generations, leaving and coming back."""

from __future__ import annotations

from kvtransfer.connector import Outcome
from kvtransfer.layout import KvGeometry
from tests.support.kv_process import RankProcess


def check_pulls(source: RankProcess, sink: RankProcess, geometry: KvGeometry) -> None:
    """Both have 32 blocks and are connected; they still are in the end."""
    blocks, into, contents = [3, 7, 8, 31, 1], [30, 2, 3, 4, 9], [11, 12, 13, 14, 15]
    source.write(blocks, contents, generation=5)
    done = sink.pull(source, blocks, into, [5] * 5)
    assert (done.outcome, done.stale, done.error) == (Outcome.OK, (), "")
    assert done.num_bytes == 5 * geometry.groups[0].block_bytes()
    assert sink.read(into, contents) == [True] * 5
    assert sink.read([1, 5], [15, 12]) == [False, False], "nothing else was touched"
    source.write([7, 31], [98, 99], generation=6)
    done = sink.pull(source, blocks, into, [5] * 5)
    assert (done.outcome, done.stale) == (Outcome.STALE, (1, 3))
    sink.disconnect(source)
    assert sink.pull(source, blocks, into, [5] * 5).outcome is Outcome.LOST
    assert sink.connect(source).error is None, "the same incarnation may come back"
    assert sink.pull(source, [7], [1], [6]).outcome is Outcome.OK
    assert sink.read([1], [98]) == [True]
