"""python -m deploy COMMAND: the one door to everything that runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from cluster.errors import SluiceError

COMMANDS = ("serve", "generate", "chat", "demo", "doctor", "check-config")


def make_parser() -> argparse.ArgumentParser:
    """Of all commands; `command` is the one that was given, `run` what it does."""
    parser = argparse.ArgumentParser(prog="python -m deploy", description="Serve one model from pools of workers.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"deploy.commands.{name.replace('-', '_')}")
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
