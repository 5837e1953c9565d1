"""From a YAML file and `--set` overrides to a SluiceConfig; every error names the key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import SluiceConfig
from cluster.errors import ConfigError


def load(
    path: str | Path | None, overrides: Iterable[str] = (), settings: Mapping[str, object] | None = None
) -> SluiceConfig:
    """The config of a file, changed by `settings` (dotted path -> value), then by `overrides`.

    An override is "dotted.path=value" with the value in YAML: "pools.decode.workers=2",
    "pools.mixed.roles=[prefill, decode]". Raises ConfigError with the dotted path and the remedy.
    """
    tree = {} if path is None else _read(Path(path))
    tree.setdefault("pools", {"prefill": {}, "decode": {}})  # so that an override changes one and keeps the other
    for key, value in (settings or {}).items():
        _place(tree, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(override, "an override is written path=value, e.g. pools.decode.workers=2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(key.strip(), f"{text!r} is no YAML value: {_one_line(error)}") from None
        _place(tree, key.strip(), value)
    return parse(tree)


def parse(tree: Mapping[str, object]) -> SluiceConfig:
    """The config of an already read tree, e.g. what `model_dump(mode="json")` gave."""
    try:
        return SluiceConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None


def keys() -> list[str]:
    """Every key there is, dotted; pools stand for any pool with `*`."""
    return sorted(_walk(SluiceConfig, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _walk(inner, f"{prefix}{name}." + ("*." if _is_table(field.annotation) else ""))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(str(key), f"stands twice{str(key_node.start_mark).rstrip()}; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read(path: Path) -> dict[str, object]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}; name another file with --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is no YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(str(path), f"holds {type(tree).__name__}, not sections; begin with `model:`")
    return tree


def _place(tree: dict[str, object], key: str, value: object) -> None:
    """Sets `key` in `tree`, making the sections on the way. Mutates `tree`."""
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        inner = tree.get(section)
        if inner is None:
            inner = tree[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(".".join(sections[: depth + 1]), f"is {inner!r}, no section; {key} cannot be set in it")
        tree = inner
    tree[last] = value


def _explain(error: ValidationError) -> ConfigError:
    """The first complaint, unknown keys before the rest: they are what usually causes it."""
    complaints = sorted(error.errors(), key=lambda complaint: complaint["type"] != "extra_forbidden")
    first = complaints[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    location = [str(part) for part in first["loc"]]
    path = ".".join(location) or "config"
    match first["type"]:
        case "extra_forbidden":
            return ConfigError(path, f"there is no such key; {_nearest(location)}")
        case "missing":
            inner = _section_of(_section_at(location).model_fields[location[-1]].annotation)
            if inner is not None:
                path += "." + next(name for name, field in inner.model_fields.items() if field.is_required())
            return ConfigError(path, f"is missing; set it in the file or with --set {path}=…")
        case "model_type" | "dict_type":
            return ConfigError(path, f"{first['input']!r} is no section of keys")
        case _:
            return ConfigError(path, f"{first['input']!r} does not fit: {first['msg'].lower()}")


def _nearest(location: list[str]) -> str:
    names = sorted(_section_at(location).model_fields)
    close = get_close_matches(location[-1], names, n=1)
    if close:
        return f"did you mean {'.'.join([*location[:-1], close[0]])}?"
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == location[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"there are {', '.join(names)}"


def _section_at(location: list[str]) -> type[BaseModel]:
    """The section in which the last part of `location` is, or would be, a key."""
    section: type[BaseModel] = SluiceConfig
    for part in location[:-1]:
        field = section.model_fields.get(part)  # none: the name of a pool, whose section we are in already
        section = (_section_of(field.annotation) if field is not None else None) or section
    return section


def _section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a field's annotation holds, directly or as the values of a table."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _is_table(annotation: object) -> bool:
    return bool(get_args(annotation))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
