"""Every file of the chart that is made from others, and its text."""

from __future__ import annotations

from pathlib import Path

from helm import alerts, dashboards, readme, schema


def files() -> dict[Path, str]:
    chart = readme.CHART
    return {
        chart / "README.md": readme.text(),
        chart / "values.schema.json": schema.text(),
        chart / "files" / "rules.yaml": alerts.text(),
        **{chart / "dashboards" / f"{each.name}.json": each.text() for each in dashboards.DASHBOARDS},
    }
