"""README.md of the chart: the comments of `values.yaml` as a table, one row per leaf that has a default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import yaml

CHART: Final = Path(__file__).parent / "sluice"

_HEAD: Final = """\
# Helm chart of sluice

One KubeRay RayService with everything around it. Needs Kubernetes 1.27 and KubeRay 1.3; what newer ones bring is said
where it is set. [docs/kubernetes.md](../../docs/kubernetes.md) says how to choose.

```
helm install NAME helm/sluice --values helm/sluice/ci/cpu-values.yaml
```

`ci/` holds recipes. Below, every value: what has a comment in `values.yaml`, with its default there. This file is made
from it by `python -m helm`.

| value | default | |
|---|---|---|
"""


class Row(NamedTuple):
    key: str  # dotted
    default: str | None  # of a leaf, in JSON; None: a section
    comment: str


def rows(text: str) -> Iterator[Row]:
    """In the order of `text`, a YAML mapping in block style. A comment belongs to the key below it."""
    tree = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped:
            comment = []
        elif stripped.startswith("# "):
            comment.append(stripped[2:])
        elif not stripped.startswith("- "):
            key = stripped.partition(":")[0]
            path = [*(each for each in path if each[0] < indent), (indent, key)]
            keys = [name for _, name in path]
            node = tree
            for name in keys:
                node = node[name]
            is_section = isinstance(node, dict) and bool(node)
            yield Row(".".join(keys), None if is_section else json.dumps(node, ensure_ascii=False), " ".join(comment))
            comment = []


def text() -> str:
    lines = [
        f"| `{row.key}` | {'' if row.default is None else f'`{row.default}`'} | {row.comment} |"
        for row in rows((CHART / "values.yaml").read_text())
        if row.default is not None or row.comment
    ]
    return _HEAD + "\n".join(lines) + "\n"
