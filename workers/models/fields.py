"""Typed reading of config.json, with errors that name the file, the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from cluster.errors import CheckpointError


class ConfigFields:
    """The keys of one JSON object. A key that is absent or null takes the default; without a default it is an error."""

    def __init__(self, path: Path, content: Mapping[str, object], prefix: str = "") -> None:
        self.path = path
        self._content = content
        self._prefix = prefix

    def refuse(self, key: str, remedy: str) -> NoReturn:
        """Raises CheckpointError about the value of `key`."""
        raise CheckpointError(f"{self.path}: {self._prefix}{key} = {self._content.get(key)!r}; {remedy}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._content.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(key, f"must be an integer >= {minimum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """None when absent."""
        return None if self._content.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None, *, minimum: float | None = None) -> float:
        """Above 0, or at least `minimum`."""
        value = self._content.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, "must be a number")
        if value <= 0 if minimum is None else value < minimum:
            self.refuse(key, "must be a number > 0" if minimum is None else f"must be a number >= {minimum:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._content.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._content.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(key, "must be a string")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, None when absent."""
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "must be a list of strings")
        return tuple(value)

    def section(self, key: str) -> ConfigFields | None:
        """The object under `key`, None when absent."""
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return ConfigFields(self.path, value, f"{self._prefix}{key}.")

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One id or a list of ids, None when absent."""
        value = self._content.get(key)
        if value is None:
            return None
        listed: list[object] = value if isinstance(value, list) else [value]
        ids: list[int] = []
        for token in listed:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                self.refuse(key, "must be a token id or a list of them")
            ids.append(token)
        return tuple(ids)
