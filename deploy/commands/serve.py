"""Serves a model on this machine, in a Ray cluster of its own, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys

from rich.console import Console

from deploy.commands.options import add_config, add_model, config_of
from deploy.local_app import LocalApp
from deploy.signals import StopSignals

HELP = "serve a model on this machine; prints `ready http://…` when the first request would succeed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_config(parser)
    parser.add_argument("--port", type=int, metavar="P", help="public port; 0: any free one (default: http.port)")


def run(options: argparse.Namespace) -> int:
    config = config_of(options)
    console = Console(stderr=True)
    signals = StopSignals()
    with console.status("starting") as status:
        app = LocalApp(config, lambda text: status.update(text) if console.is_terminal else console.print(text))
        signals.take()
        try:
            url = app.start()
            if signals.asked:
                raise KeyboardInterrupt
            status.stop()
            print(f"ready {url}", flush=True)
            while True:
                signal.pause()
        except KeyboardInterrupt:
            _stop(app, signals, console)
        except BaseException:
            signals.ignore()
            app.kill()
            if not signals.asked:
                raise
    return 0


def _stop(app: LocalApp, signals: StopSignals, console: Console) -> None:
    """Drains; a second signal cuts that short."""
    try:
        signals.take()
        app.stop()
    except KeyboardInterrupt:
        console.print("not waiting for open requests")
    finally:
        signals.ignore()
        app.kill()
        sys.stdout.flush()
