"""docs/operations.md says what the code has: every config key, metric, error and field of a route; figures as kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest

import deploy.openai_api  # brings the front door's own errors  # noqa: F401
from cluster.errors import RequestError
from router.route_book import AttemptTold, CandidateTold, OutcomeTold, RouteTold, WayTold
from tests.support.operations_page import PAGE, page

TEXT = PAGE.read_text()


def test_tables_follow_from_the_code_and_from_the_kept_runs() -> None:
    assert page() == TEXT, "run python -m tests.support.operations_page"


def errors(kind: type[RequestError] = RequestError) -> Iterator[type[RequestError]]:
    for each in kind.__subclasses__():
        yield each
        yield from errors(each)


@pytest.mark.parametrize("error", list(errors()), ids=lambda error: error.__name__)
def test_every_error_has_a_row_that_says_what_to_do(error: type[RequestError]) -> None:
    assert f"| {error.status} `{error.__name__}` |" in TEXT


@pytest.mark.parametrize("told", [RouteTold, AttemptTold, CandidateTold, WayTold, OutcomeTold])
def test_every_field_of_a_route_is_explained(told: type) -> None:
    assert [each.name for each in fields(told) if f"`{each.name}`" not in TEXT] == []
