"""What the kernel says about the pages of a mapped file in this process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Residency(NamedTuple):
    resident_bytes: int
    private_dirty_bytes: int
    shared_bytes: int  # that another process maps too; not yet written back counts as well


def mapped(path: Path) -> Residency:
    """Sums over all mappings of `path` in /proc/self/smaps; zeros when there is none."""
    sums = {"Rss": 0, "Private_Dirty": 0, "Shared_Clean": 0, "Shared_Dirty": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f" {path.resolve()}")
            continue
        key, _, value = line.partition(":")
        if inside and key in sums:
            sums[key] += int(value.split()[0]) * 1024
    return Residency(sums["Rss"], sums["Private_Dirty"], sums["Shared_Clean"] + sums["Shared_Dirty"])
