"""Every file of the chart that is made from others, and its text."""

from __future__ import annotations

from pathlib import Path

from helm import readme, schema


def files() -> dict[Path, str]:
    return {readme.CHART / "README.md": readme.text(), readme.CHART / "values.schema.json": schema.text()}
