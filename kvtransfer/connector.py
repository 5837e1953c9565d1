"""What workers use to move KV: a planner (Source, Sink; engine thread) and an executor (one per rank, bytes thread),
joined by the values Pull and Done, also where there is one rank.
"""

from kvtransfer.executor import Connected, Executor, ReadLimits
from kvtransfer.pull import BlockPair, BlockRaise, BlockRun, BlockSpan, Done, Outcome, Pull, names_together
from kvtransfer.sink import PullResult, Sink
from kvtransfer.source import Source

__all__ = [
    "BlockPair",
    "BlockRaise",
    "BlockRun",
    "BlockSpan",
    "Connected",
    "Done",
    "Executor",
    "Outcome",
    "Pull",
    "PullResult",
    "ReadLimits",
    "Sink",
    "Source",
    "names_together",
]
