"""Root directories of their own, and commands in them: what a container engine does for a RUN step, without one.

Needs root and `unshare`. What runs inside sees its own processes, and leaves no mount behind.
"""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.dockerfile import ROOT

PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"  # of the images of Python
RELEASE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_UNPACKED = ROOT / ".cache" / "debootstrap"
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # links into /usr, where a distribution merged them


def done(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Its output; fails with the end of all that it said."""
    ended = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


@dataclass(frozen=True, slots=True)
class CleanRoot:
    """`seen`: places of this machine that are there too, read-only, under the same path."""

    path: Path
    seen: tuple[Path, ...] = ()

    def run(
        self, script: str, *, cwd: str = "/", user: str = "0:0", environment: Mapping[str, str] | None = None
    ) -> str:
        """`sh -c`, as a RUN step is. Returns what it said; fails with that, too."""
        variables = {"PATH": PATH, **(environment or {})}
        root = shlex.quote(str(self.path))
        mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for place in ("/sys", *map(str, self.seen)):
            inside = root + shlex.quote(place)
            mounts += [f"mkdir -p {inside}", f"mount --rbind {shlex.quote(place)} {inside}"]
            mounts += [f"mount -o remount,bind,ro {inside}"]
        inner = [
            *("chroot", f"--userspec={user}", str(self.path), "/usr/bin/env", "-i"),
            *(f"{key}={value}" for key, value in variables.items()),
            *("sh", "-c", f"cd {shlex.quote(cwd)} || exit\n{script}"),
        ]
        outer = "\n".join(["set -e", *mounts, f"exec {shlex.join(inner)}"])
        return done(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", outer])

    def copy(self, path: Path) -> CleanRoot:
        """As the next stage of an image begins."""
        done(["cp", "--archive", "--reflink=auto", str(self.path), str(path)])
        return CleanRoot(path, self.seen)


def empty(path: Path) -> CleanRoot:
    """This machine's programs, seen read-only, and no user, no setting, no file of it. Made at once."""
    for name in ("dev", "proc", "tmp", "etc", "home", "usr"):
        (path / name).mkdir(parents=True)
    seen = [Path("/usr")]
    for name in _MERGED:
        place = Path("/") / name
        if place.is_symlink():
            (path / name).symlink_to(os.readlink(place))
        elif place.exists():
            seen.append(place)
    (path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (path / "etc" / "group").write_text("root:x:0:\n")
    return CleanRoot(path, tuple(seen))


def debian(path: Path, *packages: str) -> CleanRoot | None:
    """A fresh Debian with those packages, which reaches what this machine reaches; None: there is no debootstrap."""
    tool = _debootstrap()
    if tool is None:
        return None
    environment = {**os.environ, "DEBOOTSTRAP_DIR": str(_UNPACKED / "usr" / "share" / "debootstrap")}
    include = f"--include={','.join(packages)}"
    done(["unshare", "--mount", str(tool), "--variant=minbase", include, RELEASE, str(path), _MIRROR], environment)
    shutil.copy("/etc/resolv.conf", path / "etc" / "resolv.conf")
    _, places = pip_settings()
    for file in filter(Path.is_file, places):
        inside = path / file.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, inside)
    return CleanRoot(path, tuple(filter(Path.is_dir, places)))


@cache
def pip_settings() -> tuple[Mapping[str, str], tuple[Path, ...]]:
    """Which index pip asks here, as its environment variables, and the files and directories that they name."""
    settings: dict[str, str] = {}
    for line in done([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        key, _, value = line.partition("=")
        settings[f"PIP_{key.rpartition('.')[2].replace('-', '_').upper()}"] = ast.literal_eval(value)
    words = [word for value in settings.values() for word in value.split()]
    places = {Path(word) for word in words if word.startswith("/")}
    places |= {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file://")}
    return settings, tuple(sorted(place for place in places if place.exists()))  # an index names files beside it


def _debootstrap() -> Path | None:
    """Debian's own tool, unpacked under .cache: it is a script and need not be installed."""
    tool = _UNPACKED / "usr" / "sbin" / "debootstrap"
    if not tool.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        _UNPACKED.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(["apt-get", "download", "-qq", "debootstrap"], cwd=_UNPACKED, check=False)
        for package in _UNPACKED.glob("debootstrap_*.deb"):
            if fetched.returncode == 0:
                subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=_UNPACKED, check=True)
            package.unlink()
    return tool if tool.exists() else None
