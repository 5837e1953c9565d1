import io
import json

import pytest

from cluster.config import LogConfig
from cluster.log import FIELDS, Log


def test_json_lines_carry_event_and_fields() -> None:
    stream = io.StringIO()
    log = Log.open("workers", LogConfig(format="json"), stream, role="decode", rank=1)
    log.bind(request="a1").info("request ended", finish="length", num_tokens=64)
    log.debug("below the level")
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "info",
        "part": "workers",
        "event": "request ended",
        "role": "decode",
        "rank": 1,
        "request": "a1",
        "finish": "length",
        "num_tokens": 64,
    }


def test_human_lines() -> None:
    stream = io.StringIO()
    Log.open("router", LogConfig(), stream).warning("no worker", reason="all gone", elapsed_s=0.25)
    assert stream.getvalue().endswith(' warning router: no worker reason="all gone" elapsed_s=0.25\n')


@pytest.mark.parametrize("field", ["prompt", "text", "messages", "token_ids", "api_key", "secret"])
def test_what_a_client_wrote_is_refused(field: str) -> None:
    stream = io.StringIO()
    log = Log.open("ingress", LogConfig(level="error"), stream)
    with pytest.raises(AssertionError, match=field):
        log.debug("even below the level", **{field: "my diary"})
    with pytest.raises(AssertionError, match=field):
        log.bind(**{field: "my diary"})
    assert "diary" not in stream.getvalue()
    assert field not in FIELDS


def test_long_values_are_cut() -> None:
    stream = io.StringIO()
    Log.open("ingress", LogConfig(format="json"), stream).info("odd", error="x" * 10_000)
    assert len(json.loads(stream.getvalue())["error"]) == 501


@pytest.mark.parametrize("style", ["human", "json"])
def test_exceptions_show_where(style: str) -> None:
    stream = io.StringIO()
    log = Log.open("workers", LogConfig.model_validate({"format": style}), stream)
    try:
        raise ValueError("bad block 7")
    except ValueError as error:
        log.error("step failed", exception=error, step=3)
    assert "bad block 7" in stream.getvalue()
    assert "test_exceptions_show_where" in stream.getvalue()


def test_opening_twice_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    Log.open("workers", LogConfig(), first)
    Log.open("workers", LogConfig(), second).info("ready")
    assert (first.getvalue(), second.getvalue().count("ready")) == ("", 1)
