"""What Prometheus asks the public port: whom to scrape. Its HTTP service discovery (`http_sd_configs`).

The public port sends each request to one replica; so every process, replicas included, exports its metrics on a port
of its own, and any replica names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastapi import FastAPI
from pydantic import BaseModel

from cluster.exporter import Export

PATH = "/prometheus/targets"


def add_targets(app: FastAPI, name: str, model: str, exports: Callable[[], Iterable[Export]]) -> None:
    """Adds the route. `exports` is asked anew at each request."""

    @app.get(PATH)
    async def targets() -> list[TargetGroup]:
        return [_group(name, model, export) for export in exports()]


class TargetGroup(BaseModel):
    """As Prometheus's HTTP service discovery reads it."""

    targets: list[str]
    labels: dict[str, str]


def _group(app: str, model: str, export: Export) -> TargetGroup:
    """One group per target, for its labels. Prometheus lets them win over a metric's: no metric has one of these."""
    labels = {
        "app": app,
        "model": model,
        "role": "_".join(export.roles),
        "name": export.name,
        "incarnation": export.incarnation,
    }
    return TargetGroup(targets=[export.address], labels=labels)
