"""What every command takes: --config, --set, and shorthands for some keys."""

from __future__ import annotations

import argparse

from cluster.config import SluiceConfig
from cluster.config_file import load


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file, e.g. deploy/configs/cpu-disaggregated.yaml")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="overrides one key, e.g. pools.decode.workers=2; may be repeated",
    )


def add_model(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument("--model", metavar="DIR", required=required, help="checkpoint in Hugging Face format")
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        help="dummy: random weights of the right shapes, no weight file read",
    )


def config_of(options: argparse.Namespace) -> SluiceConfig:
    """The config file, changed by the command's shorthands, then by --set. Raises ConfigError."""
    shorthands = {"model.path": "model", "model.load_format": "load_format", "http.port": "port"}
    given = {key: getattr(options, name, None) for key, name in shorthands.items()}
    return load(options.config, options.overrides, {key: value for key, value in given.items() if value is not None})
