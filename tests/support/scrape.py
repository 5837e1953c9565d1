"""Prometheus's part: asks whom to scrape, scrapes them, reads the samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one process at one time."""

    samples: dict[str, dict[frozenset[tuple[str, str]], float]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Over every series of the name that has these labels."""
        series = self.samples.get(name, {})
        return sum(value for key, value in series.items() if key >= frozenset(labels.items()))

    def values(self, name: str, label: str) -> set[str]:
        return {value for key in self.samples.get(name, {}) for each, value in key if each == label}


@dataclass(frozen=True, slots=True)
class Target:
    address: str
    labels: dict[str, str]

    @property
    def name(self) -> str:
        return self.labels["name"]

    @property
    def incarnation(self) -> str:
        return self.labels["incarnation"]

    def scrape(self) -> Scrape:
        return scrape(self.address)


def scrape(address: str) -> Scrape:
    answer = httpx.get(f"http://{address}/metrics", timeout=10, trust_env=False)
    assert answer.status_code == 200, answer.text
    samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.type != "unknown" and family.documentation, family
        for sample in family.samples:
            series = samples.setdefault(sample.name, {})
            key = frozenset(sample.labels.items())
            assert key not in series, f"{sample} stands twice"
            series[key] = sample.value
    return Scrape(samples)


def targets(url: str) -> list[Target]:
    answer = httpx.get(f"{url}/prometheus/targets", timeout=10, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return [Target(address, group["labels"]) for group in answer.json() for address in group["targets"]]
