"""What the CPU recipe renders, kept to be looked at: `python -m tests.helm.golden` writes it anew."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support import chart

PATH = Path(__file__).parents[1] / "fixtures" / "helm-cpu.yaml"


def text() -> str:
    """Without what is a file of its own in the chart, and its digest."""
    kept = [each for each in chart.render(chart.recipe("cpu")) if each["kind"] != "ConfigMap"]
    for template in chart.pod_templates(kept).values():
        del template["metadata"]["annotations"]["sluice/pod-health-sha256"]
    return yaml.safe_dump_all(kept, sort_keys=False)


if __name__ == "__main__":
    PATH.write_text(text())
