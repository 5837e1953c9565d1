"""What encode workers should hand over (`kv.encoder_output`): keys and values, or hidden states.

    python -m benchmarks.encoder_output [--requests 24] [--tokens 64 256 1024] [--json FILE]

An encode and a decode worker, one thread each, as processes of this machine, which read each other's memory by NIXL;
the model is benchmarks.encdec's, of T5-small's shape, in fp32. Requests with inputs that nobody has read come one after
the other, and ask for one token. Both clusters run at the same time and are asked in turn, so that whatever else the
machine does meets both. Told, as medians: bytes for a request; the time until the output is with the decode worker, as
that measures it, and until its token is there; and the CPU time of both workers, whose sum is what a request costs and
whose second part is what the streams of the decode worker wait for.

The products that make keys and values of hidden states are done by the encode worker or by the decode worker; so the
first token hardly tells the two apart, but for what a link takes for the bytes, and the decode worker's time does.
Where a link moves the bytes that hidden states spare in the time that they cost there both are equal: the break-even.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.encdec import BLOCK_SIZE, SHAPE, make_checkpoint
from benchmarks.report import Figure, Report, Setting, progress, publish
from cluster.request import SamplingParams
from tests.support.plain_cluster import PlainCluster, plain_cluster

MODES = {"cross_kv": "keys and values", "hidden_states": "hidden states"}
GREEDY = SamplingParams(max_tokens=1, ignore_eos=True)
WORKERS = ("encode-0", "decode-0")
NUM_WARM_UPS = 3


@dataclass(slots=True)
class Record:
    """Of one mode and input length."""

    num_bytes: list[int] = field(default_factory=list)
    fetch_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)  # of CPU time, all threads
    decode_s: list[float] = field(default_factory=list)


def cpu_s(cluster: PlainCluster, name: str) -> float:
    """That a worker's threads have had so far."""
    tasks = Path(f"/proc/{cluster.workers[name].process.pid}/task")
    return sum(int(task.joinpath("schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def settings(folder: Path, mode: str, longest: int) -> dict[str, object]:
    return {
        "model.path": str(folder),
        "kv.block_size": BLOCK_SIZE,
        "kv.num_blocks": 512,
        "kv.encoder_output": mode,
        "scheduler.max_encoder_tokens": longest,
        "router.local_prefill": "always",
        "words.heartbeat_timeout_s": 30.0,
        "words.step_timeout_s": 30.0,  # a busy machine is no failure here
        "pools": {"encode": {"workers": 1}, "decode": {"workers": 1}},
    }


async def ask(cluster: PlainCluster, source: tuple[int, ...], record: Record) -> list[int]:
    before = [cpu_s(cluster, name) for name in WORKERS]
    started = time.perf_counter()
    answers = [answer async for _, answer in cluster.stream([0], GREEDY, encoder_token_ids=source)]
    record.token_s.append(time.perf_counter() - started)
    answer = answers[-1]
    assert answer is not None and answer.route.encoded.encode.name == "encode-0", "its output was not fetched"
    record.num_bytes.append(answer.route.encoded.bytes)
    record.fetch_s.append(answer.route.encoded.seconds)
    for times, name, then in zip((record.encode_s, record.decode_s), WORKERS, before, strict=True):
        times.append(cpu_s(cluster, name) - then)
    return answer.token_ids


async def measure(folder: Path, lengths: list[int], num_requests: int) -> tuple[dict[tuple[str, int], Record], int]:
    """By mode and length; and how many requests got the same token both ways."""
    draw = random.Random(0)
    records = {(mode, length): Record() for mode in MODES for length in lengths}
    num_equal = 0
    async with AsyncExitStack() as stack:
        clusters = {
            mode: await stack.enter_async_context(plain_cluster(settings(folder, mode, max(lengths)))) for mode in MODES
        }
        for length in lengths:
            for number in range(NUM_WARM_UPS + num_requests):
                source = tuple(draw.randrange(2, SHAPE["vocab_size"]) for _ in range(length))
                told: list[list[int]] = []
                for mode, cluster in clusters.items():
                    record = records[mode, length] if number >= NUM_WARM_UPS else Record()
                    told.append(await ask(cluster, source, record))
                num_equal += number >= NUM_WARM_UPS and told[0] == told[1]
            progress(f"inputs of {length} tokens are done")
    return records, num_equal


def figures_of(records: dict[tuple[str, int], Record], lengths: list[int]) -> list[Figure]:
    figures: list[Figure] = []
    for length in lengths:
        kept, states = (records[mode, length] for mode in MODES)
        for mode, name in MODES.items():
            record = records[mode, length]
            what = f"{length} tokens, {name}"
            figures.append(Figure(f"{what}: moved", median(record.num_bytes) / 1e3, "kB/request"))
            figures.append(Figure(f"{what}: output is there", 1e3 * median(record.fetch_s), "ms"))
            figures.append(Figure(f"{what}: first token", 1e3 * median(record.token_s), "ms"))
            figures.append(Figure(f"{what}: encode worker", 1e3 * median(record.encode_s), "CPU ms/request"))
            figures.append(Figure(f"{what}: decode worker", 1e3 * median(record.decode_s), "CPU ms/request"))
        spared = median(kept.num_bytes) - median(states.num_bytes)
        more_s = median(states.decode_s) - median(kept.decode_s)
        figures.append(Figure(f"{length} tokens: hidden states cost the decode worker", 1e3 * more_s, "CPU ms more"))
        if more_s > 0:
            note = "slower links: hidden states"
            figures.append(Figure(f"{length} tokens: break-even", spared / more_s / 1e6, "MB/s", note=note))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="of the inputs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    setting = Setting.here()
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name))
        records, num_equal = asyncio.run(measure(Path(name), arguments.tokens, arguments.requests))
    count = arguments.requests * len(arguments.tokens)
    figures = [Figure("equal first tokens", num_equal, f"of {count}", count), *figures_of(records, arguments.tokens)]
    told = {name: getattr(arguments, name) for name in ("requests", "tokens")}
    publish(
        Report("encoder_output", "Encode and decode worker, one thread each, NIXL", told, figures, setting),
        arguments.json,
    )


if __name__ == "__main__":
    main()
