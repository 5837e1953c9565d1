"""What the ingress tells a collector of traces."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.section import Section


class TracesConfig(Section):
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")] | None = None
    """Where traces go: the URL of an OTLP/HTTP receiver, e.g. http://collector:4318/v1/traces; none: no traces."""
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the requests that are traced; one that brings a `traceparent` is traced if that says so."""
