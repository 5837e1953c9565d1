"""Another revision of a checkpoint, for what must roll from one to the other."""

from __future__ import annotations

import json
from pathlib import Path


def another_revision(source: Path, directory: Path) -> str:
    """The same weights under another configuration: tokens are the same, the compatibility hash is not."""
    for file in source.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "initializer_range": 0.03}))
    return str(directory)
