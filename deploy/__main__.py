"""python -m deploy COMMAND: the one door to everything that runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from cluster.errors import SluiceError

COMMANDS = ("serve", "generate", "demo", "doctor", "check-config")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy", description="Serve one model from pools of workers.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: import_module(f"deploy.commands.{name.replace('-', '_')}") for name in COMMANDS}
    for name, module in modules.items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    try:
        return modules[options.command].run(options)
    except SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
