"""Writes what the chart generates: `python -m helm`."""

from __future__ import annotations

from helm.generated import files

for path, text in files().items():
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)
