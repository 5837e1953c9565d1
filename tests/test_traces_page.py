"""The page on traces shows what a receiver got, and names every attribute that a span has."""

from __future__ import annotations

import json
import re

from tests.support.otlp_receiver import roots
from tests.support.traces_page import KEPT, PAGE, page

TEXT = PAGE.read_text()


def test_the_trees_are_those_of_the_kept_traces() -> None:
    assert page() == TEXT, "run python -m tests.support.traces_page"


def test_the_page_names_every_span_and_attribute() -> None:
    table = TEXT.partition("## What is in a trace")[2].partition("## ")[0]
    named = {word for code in re.findall("`([^`]+)`", table) for word in re.findall(r"[a-z_.]+", code)}
    spans = [span for rows in json.loads(KEPT.read_text()).values() for root in roots(rows) for span in root.below()]
    attributes = {key.removeprefix("sluice.") for span in spans for key in span.attributes}
    assert len(attributes) > 20 and not attributes - named
    assert {span.name.partition(" ")[0] for span in spans} <= named
