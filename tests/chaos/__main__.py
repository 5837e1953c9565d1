"""Chaos: a cluster under load, faults at random moments, and a report of all that was expected and came.

    python -m tests.chaos --report FILE [--seed 0] [--faults 300] [--minutes 30] [--only KIND …] [--served]

Plain worker and ingress processes, on two simulated hosts where this machine allows it. With --served, an app in Ray
Serve instead, whose controller is killed. The judge's verdict follows; it can be had again with
`python -m tests.chaos.judge FILE`. The exit status is the judge's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from tests.chaos.what import What


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=30.0, help="no fault begins later")
    parser.add_argument("--served", action="store_true", help="kill the controller of an app in Ray Serve")
    parser.add_argument("--only", nargs="+", type=What, default=list(What), metavar="KIND", help=", ".join(What))
    parser.add_argument("--at-least", type=int, default=0, help="for the judge: faults of each kind")
    parser.add_argument("--states", type=int, default=1, help="for the judge: states of each kind")
    parser.add_argument("--times", choices=("judge", "tell"), default="judge", help="for the judge")
    parser.add_argument("--json", type=Path, help="the judge's summary")
    options = parser.parse_args()
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    """What is heavy is imported here: the module itself is imported by every process of the cluster."""
    from tests.chaos import judge
    from tests.chaos.campaign import Campaign, run
    from tests.chaos.record import Report

    campaign = Campaign(
        seed=options.seed, num_faults=options.faults, minutes=options.minutes, kinds=tuple(options.only)
    )
    report = Report(options.report)
    try:
        if options.served:
            from tests.chaos.served import run_served

            run_served(campaign, report, _say)
        else:
            asyncio.run(run(campaign, report, _say))
    finally:
        report.close()
    return judge.tell(
        (options.report,),
        at_least=options.at_least,
        num_states=options.states,
        times=options.times,
        json_path=options.json,
    )


def _say(told: str) -> None:
    print(told, flush=True)


if __name__ == "__main__":
    sys.exit(main())
