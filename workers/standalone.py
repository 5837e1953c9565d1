"""A worker as a plain process, without Ray: for tests, benchmarks and `generate`.

    python -m workers.standalone --config FILE [--set KEY=VALUE] --pool decode --name decode-0

Prints its membership entry as one JSON line once it listens, and nothing else: what libraries print goes to standard
error. Takes a membership (JSON, one line) from standard input whenever it changes, and ends, drained by nobody, when
standard input closes. The cluster secret comes from the environment variable that the config names.
"""

from __future__ import annotations

import argparse
import os
import sys

from cluster import config_file
from cluster.config import SluiceConfig
from cluster.errors import ConfigError, SluiceError
from cluster.log import Log
from cluster.membership import Membership
from kvtransfer import nixl_transport
from workers.assembly import WorkerSettings
from workers.worker import Worker

CRASHED = 70  # exit status
STDOUT, STDERR = 1, 2


def make_worker(config: SluiceConfig, pool: str, name: str, secret: bytes, incarnation: str | None = None) -> Worker:
    """The worker of this process: prepares it for NIXL, and a crash of the engine loop ends it."""
    nixl_transport.prepare_environment(config.transfer.ucx_tls)
    settings = WorkerSettings.of(config, pool, name, secret, incarnation)
    return Worker(settings, Log.open("worker", config.log), on_crash=lambda _: os._exit(CRASHED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--pool", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    try:
        _run(options)
    except SluiceError as error:
        sys.exit(f"error: {error}")


def _run(options: argparse.Namespace) -> None:
    config = config_file.load(options.config, options.overrides)
    secret = os.environ.get(config.words.secret_env, "")
    if not secret:
        raise ConfigError("words.secret_env", f"environment variable {config.words.secret_env} is empty; set it")
    if options.pool not in config.pools:
        raise ConfigError("pools", f"no pool is named {options.pool!r}; there are {', '.join(config.pools)}")
    output = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)  # UCX prints its warnings
    worker = make_worker(config, options.pool, options.name, secret.encode())
    member = worker.start()
    with os.fdopen(output, "wb") as told:
        told.write(Membership(1, (member,)).to_wire() + b"\n")
    for line in sys.stdin.buffer:
        worker.update_members(Membership.from_wire(line))
    worker.stop()


if __name__ == "__main__":
    main()
