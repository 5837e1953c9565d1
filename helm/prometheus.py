"""Answers of a Prometheus server to what panels and alerts ask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import httpx
from pydantic import BaseModel

_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Series:
    """One line: at each time in `times_s` (Unix) a value, NaN where Prometheus computed none."""

    labels: Mapping[str, str]
    times_s: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def is_told(self) -> bool:
        return any(math.isfinite(value) for value in self.values)


@dataclass(frozen=True, slots=True)
class Span:
    """From `start_s` to `end_s` (Unix), a point each `step_s`; rates are over `window_s` before a point."""

    start_s: float
    end_s: float
    step_s: float
    window_s: float

    @property
    def num_points(self) -> int:
        return int((self.end_s - self.start_s) / self.step_s) + 1


class PrometheusError(Exception):
    """The server refused a question."""


class Prometheus:
    """A client of one server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False)

    def between(self, expr: str, span: Span, app: str = "") -> list[Series]:
        """`expr` may hold Grafana's $__rate_interval, and $app. Raises PrometheusError, httpx.HTTPError."""
        question = {
            "query": expr.replace("$__rate_interval", f"{span.window_s:g}s").replace("$app", app),
            "start": f"{span.start_s:.3f}",
            "end": f"{span.end_s:.3f}",
            "step": f"{span.step_s:g}",
        }
        answer = _Answer.model_validate_json(self.get("/api/v1/query_range", question))
        return [_series(each) for each in answer.data.result]

    def apps(self) -> list[str]:
        """What the variable `app` of a dashboard offers."""
        question = {"match[]": "sluice_ingress_open_requests"}
        return _Names.model_validate_json(self.get("/api/v1/label/app/values", question)).data

    def get(self, path: str, question: Mapping[str, str] | None = None) -> bytes:
        """The JSON of any path. Raises PrometheusError, httpx.HTTPError."""
        answer = self._client.get(path, params=dict(question or {}))
        if answer.status_code != httpx.codes.OK:
            raise PrometheusError(f"{answer.status_code} to {path} {dict(question or {})}: {answer.text[:500]}")
        return answer.content


class _Row(BaseModel):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Matrix(BaseModel):
    resultType: Literal["matrix"]
    result: list[_Row]


class _Answer(BaseModel):
    data: _Matrix


class _Names(BaseModel):
    data: list[str]


def _series(row: _Row) -> Series:
    return Series(row.metric, tuple(at for at, _ in row.values), tuple(float(value) for _, value in row.values))
