"""Every dashboard as a picture, from a Prometheus that scrapes an app.

    python -m helm.pictures http://prometheus:9090 [--app NAME] [--minutes 60] [--into DIRECTORY]

Writes DIRECTORY/dashboard-NAME.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import httpx

from helm.dashboards import DASHBOARDS
from helm.picture import Story, draw
from helm.prometheus import Prometheus, PrometheusError, Span

DRAWN = "Source"  # of a picture: the digest of the dashboard that it shows
_POINTS = 240
_LEAST_WINDOW_S = 60.0  # four scrapes of the usual 15 s


def write(server: Prometheus, app: str, span: Span, story: Story, into: Path) -> list[Path]:
    into.mkdir(parents=True, exist_ok=True)
    paths = [into / f"dashboard-{dashboard.name}.png" for dashboard in DASHBOARDS]
    for dashboard, path in zip(DASHBOARDS, paths, strict=True):
        draw(dashboard, server, app, span, story).savefig(path, dpi=90, metadata={DRAWN: dashboard.digest})
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helm.pictures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prometheus", help="URL of the server")
    parser.add_argument("--app", help="as in the label app; needed where there are several")
    parser.add_argument("--minutes", type=float, default=60.0, help="up to now (60)")
    parser.add_argument("--into", type=Path, default=Path(), help="directory (.)")
    options = parser.parse_args()
    server = Prometheus(options.prometheus)
    try:
        apps = server.apps()
        app = options.app or (apps[0] if len(apps) == 1 else None)
        if app not in apps:
            print(f"--app: there are {', '.join(apps) or 'none'}; name one of them", file=sys.stderr)
            return 2
        end_s, length_s = time.time(), 60 * options.minutes
        step_s = length_s / _POINTS
        span = Span(end_s - length_s, end_s, step_s, max(_LEAST_WINDOW_S, 4 * step_s))
        for path in write(server, app, span, Story(app), options.into):
            print(path)
    except (httpx.HTTPError, PrometheusError) as error:
        print(f"{options.prometheus}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
