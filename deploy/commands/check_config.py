"""Prints the config as it would be used, or what is wrong with it."""

from __future__ import annotations

import argparse
import sys

import yaml

from cluster.placement import place, total
from deploy.commands.options import add_config, add_model, config_of

HELP = "print the effective config, or the key that is wrong and the remedy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_model(parser)


def run(options: argparse.Namespace) -> int:
    config = config_of(options)
    placements = place(config.pools)
    asked = total(placements)
    yaml.safe_dump(config.model_dump(mode="json"), sys.stdout, sort_keys=False, allow_unicode=True)
    print(f"# {len(placements)} workers reserve {asked.cpus:g} CPU cores and {asked.gpus:g} GPUs in Ray")
    return 0
