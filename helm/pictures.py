"""Every dashboard as a page and as a picture of it, from a Prometheus that scrapes an app.

    python -m helm.pictures http://prometheus:9090 [--app NAME] [--minutes 60] [--into DIRECTORY]
    python -m helm.pictures .cache/dashboards/record.json [--into DIRECTORY]

Writes DIRECTORY/dashboard-NAME.png; the pages, and what the server answered, are kept in .cache/dashboards. The
second form draws anew from that. Needs Chromium, and npm the first time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Final

import httpx
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from helm.chromium import ChromiumError, screenshot
from helm.dashboards import DASHBOARDS
from helm.page import CACHE, PageError, Plotter, html
from helm.prometheus import Prometheus, PrometheusError, Span
from helm.record import Record, ask

DRAWN: Final = "Source"  # of a picture: the digest of the dashboard that it shows
_POINTS: Final = 240
_LEAST_WINDOW_S: Final = 60.0  # four scrapes of the usual 15 s


def write(record: Record, into: Path, cache: Path = CACHE) -> list[Path]:
    """Raises PageError, ChromiumError."""
    for directory in (into, cache):
        directory.mkdir(parents=True, exist_ok=True)
    (cache / "record.json").write_text(record.model_dump_json(), encoding="utf-8")
    plotter = Plotter.fetch()
    paths = [into / f"dashboard-{board.name}.png" for board in DASHBOARDS]
    for board, path in zip(DASHBOARDS, paths, strict=True):
        page = cache / f"{board.name}.html"
        page.write_text(html(board, record, plotter), encoding="utf-8")
        kept = PngInfo()
        kept.add_text(DRAWN, board.digest)
        screenshot(page).save(path, optimize=True, pnginfo=kept)
    return paths


def _record(options: argparse.Namespace) -> Record:
    """Raises PageError, and what the server's questions raise."""
    if not options.source.startswith(("http://", "https://")):
        return Record.model_validate_json(Path(options.source).read_bytes())
    server = Prometheus(options.source)
    apps = server.apps()
    app = options.app or (apps[0] if len(apps) == 1 else None)
    if app not in apps:
        raise PageError(f"--app: there are {', '.join(apps) or 'none'}; name one of them")
    end_s, length_s = time.time(), 60 * options.minutes
    step_s = length_s / _POINTS
    return ask(server, app, Span(end_s - length_s, end_s, step_s, max(_LEAST_WINDOW_S, 4 * step_s)), app, {})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helm.pictures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", help="URL of the server, or the path of what one answered before")
    parser.add_argument("--app", help="as in the label app; needed where there are several")
    parser.add_argument("--minutes", type=float, default=60.0, help="up to now (60)")
    parser.add_argument("--into", type=Path, default=Path(), help="directory (.)")
    options = parser.parse_args()
    try:
        for path in write(_record(options), options.into):
            print(path)
    except (OSError, ValidationError, httpx.HTTPError, PrometheusError, PageError, ChromiumError) as error:
        print(f"{options.source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
