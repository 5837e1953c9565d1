"""Structured logs: an event in words, and fields from a closed list. Never a prompt, a token, a key.

    log = Log.open("workers", config.log, role="decode", rank=0)
    log.info("request ended", request="a1b2", finish="length", num_tokens=64)

A field that is not listed is a bug of ours and raises at once, in every level, so that no test passes with it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

from cluster.config import LogConfig

# What may be logged. Sizes, names, outcomes: nothing that a client wrote. Extending it is a decision.
FIELDS = frozenset(
    """
    request attempt role rank shard worker pool peer incarnation session epoch pid
    address port host transport model device dtype backend chosen rejected version
    reason code error finish outcome state stage plan
    num_tokens num_prompt_tokens num_blocks num_bytes num_sequences num_workers num_requests num_restarts
    prefix_hit_tokens step chunk group
    elapsed_s ttft_s queue_s transfer_s deadline_s age_s rate_bytes_per_s
    """.split()
)

Value = str | int | float | bool | None

_MAX_TEXT = 500  # characters of one value: no field carries a document


class Log:
    """A logger with fields bound to it. Immutable; any thread."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: dict[str, Value] | None = None) -> None:
        self._logger = logger
        self._bound = _checked(bound or {})

    @classmethod
    def open(cls, name: str, config: LogConfig, stream: TextIO | None = None, **bound: Value) -> Log:
        """The process's log, called once in its main: replaces the handlers of the logger "sluice"."""
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(JsonFormatter() if config.format == "json" else HumanFormatter())
        root = logging.getLogger("sluice")
        root.handlers[:] = [handler]
        root.setLevel(config.level.upper())
        root.propagate = False
        return cls(root.getChild(name), bound)

    def bind(self, **fields: Value) -> Log:
        """A log that adds `fields` to every line."""
        return Log(self._logger, {**self._bound, **fields})

    def debug(self, event: str, **fields: Value) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Value) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Value) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, *, exception: BaseException | None = None, **fields: Value) -> None:
        """`exception` adds its type and the traceback's places, not its locals."""
        self._write(logging.ERROR, event, fields, exception)

    def _write(self, level: int, event: str, fields: dict[str, Value], exception: BaseException | None = None) -> None:
        merged = {**self._bound, **_checked(fields)}
        if self._logger.isEnabledFor(level):
            info = None if exception is None else (type(exception), exception, exception.__traceback__)
            self._logger.log(level, event, exc_info=info, extra={"sluice_fields": merged})


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Value] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "part": record.name.removeprefix("sluice."),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """`12:00:01.250 info  workers: request ended request=a1b2 finish=length`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        fields = "".join(f" {name}={_shown(value)}" for name, value in _fields(record).items())
        part = record.name.removeprefix("sluice.")
        line = f"{clock} {record.levelname.lower():7} {part}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _checked(fields: dict[str, Value]) -> dict[str, Value]:
    for name, value in fields.items():
        if name not in FIELDS:  # no assert statement: this must hold under -O too
            raise AssertionError(f"log field {name!r} is not in cluster.log.FIELDS")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            fields = {**fields, name: value[:_MAX_TEXT] + "…"}
    return fields


def _fields(record: logging.LogRecord) -> dict[str, Value]:
    return getattr(record, "sluice_fields", {})


def _shown(value: Value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c == '"' for c in text) else text


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
