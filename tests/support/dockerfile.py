"""deploy/Dockerfile, read as a container engine reads it; none is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (RUN, what follows)

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def _stages() -> dict[str, Stage]:
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text()).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    stage = Stage("", "")
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = stage = Stage(name, base)
        else:
            stage.steps.append((instruction, " ".join(rest.split())))
    return found


STAGES = _stages()


def lineage(name: str) -> list[Stage]:
    """The stage and what it is built on, the last first."""
    stage = STAGES[name]
    return [stage, *(lineage(stage.base) if stage.base in STAGES else [])]
