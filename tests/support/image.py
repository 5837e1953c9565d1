"""An image of deploy/Dockerfile put together without a container engine: each stage in a root of its own.

The base image is not there: Debian's own Python stands in its place, as an environment in /usr/local, where the images
of Python have theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.clean_root import CleanRoot, pip_settings
from tests.support.dockerfile import ROOT, STAGES

PACKAGES = ("python3", "python3-venv")  # of Debian, for the base

# Whose steps are not run, and why.
NOT_RUN: Mapping[str, str] = {
    "build-cuda": "several GB of kernels that only a GPU can start; their names and pins are compared as text",
}


@dataclass(slots=True)
class Built:
    """As an engine keeps it: files, and what the next instruction or process begins with."""

    root: CleanRoot
    environment: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "0:0"
    command: tuple[str, ...] = ()
    ran: list[str] = field(default_factory=list)  # RUN steps, those of earlier stages included

    def run(self, script: str, **more: str) -> str:
        return self.root.run(script, cwd=self.cwd, user=self.user, environment={**self.environment, **more})

    def inside(self, place: str) -> Path:
        """Of a path as it is said inside; relative ones begin at the working directory."""
        return self.root.path / (Path(self.cwd) / place).relative_to("/")


class Image:
    def __init__(self, base: CleanRoot, directory: Path) -> None:
        base.run("python3 -m venv /usr/local")
        self._base = base
        self._directory = directory
        self._stages: dict[str, Built] = {}

    def build(self, name: str) -> Built:
        """The stage, after those that it needs; made once. What comes from stages that are not run is left out."""
        if name in self._stages:
            return self._stages[name]
        stage = STAGES[name]
        if stage.base in STAGES:
            before = self.build(stage.base)
            built = Built(before.root.copy(self._directory / name), dict(before.environment), before.cwd, before.user)
            built.command, built.ran = before.command, list(before.ran)
        else:
            built = Built(self._base.copy(self._directory / name))
        does: Mapping[str, Callable[[Built, str], None]] = {
            "ENV": _env, "WORKDIR": _workdir, "USER": _user, "CMD": _cmd, "RUN": _run, "COPY": self._copy
        }  # fmt: skip
        for instruction, text in stage.steps:
            if instruction != "ARG":  # none has a default
                does[instruction](built, text)
        self._stages[name] = built
        return built

    def _copy(self, built: Built, text: str) -> None:
        *sources, target = text.split()
        if sources[0].startswith("--from="):
            stage = sources[0].removeprefix("--from=")
            if stage not in NOT_RUN:
                origin = self.build(stage).inside(sources[1])
                shutil.copytree(origin, built.inside(target), symlinks=True, dirs_exist_ok=True)
            return
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, built.inside(target), ignore=ignored)
            else:
                shutil.copy(ROOT / source, built.inside(target))


def _env(built: Built, text: str) -> None:
    built.environment |= dict(each.split("=", 1) for each in text.split())


def _workdir(built: Built, text: str) -> None:
    built.cwd = text
    built.inside(text).mkdir(parents=True, exist_ok=True)


def _user(built: Built, text: str) -> None:
    built.user = text


def _cmd(built: Built, text: str) -> None:
    built.command = tuple(json.loads(text))


def _run(built: Built, text: str) -> None:
    settings, _ = pip_settings()
    built.run(text, **{name: value for name, value in settings.items() if name not in built.environment})
    built.ran.append(text)
