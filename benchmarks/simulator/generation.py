"""A trace of conversations, written as JSON lines.

python -m benchmarks.simulator trace FILE [--seed 0] [--span 160] [--sessions-per-s 5] [--beginnings 200] …
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.report import progress
from benchmarks.simulator.comparison import CHAT
from benchmarks.simulator.trace import write


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=CHAT.seed)
    parser.add_argument("--span", type=float, default=CHAT.span_s, help="seconds")
    parser.add_argument("--sessions-per-s", type=float, default=CHAT.sessions_per_s)
    parser.add_argument("--beginnings", type=int, default=CHAT.num_beginnings, help="shared by sessions")
    parser.add_argument("--trace-block", type=int, default=CHAT.trace_block, help="tokens that a hash id stands for")


def run(options: argparse.Namespace) -> None:
    talk = replace(
        CHAT.lasting(options.span),
        seed=options.seed,
        sessions_per_s=options.sessions_per_s,
        num_beginnings=options.beginnings,
        trace_block=options.trace_block,
    )
    requests = talk.requests()
    write(options.file, requests)
    progress(f"{len(requests)} requests of {len({each.session for each in requests})} sessions: {options.file}")
