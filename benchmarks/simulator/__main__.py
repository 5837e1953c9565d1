"""A cluster in virtual time: what policies are worth, and what the figures of a model of it are worth.

python -m benchmarks.simulator compare|trace|validate|day … (--help says more)
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.simulator import comparison, generation, scaling, validation
from benchmarks.simulator.trace import TraceError

COMMANDS = {"compare": comparison, "trace": generation, "validate": validation, "day": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_options(
            commands.add_parser(name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        )
    options = parser.parse_args()
    try:
        COMMANDS[options.command].run(options)
    except (TraceError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
