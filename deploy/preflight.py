"""Is this machine fit, and is `.venv` as pyproject.toml and constraints.txt want it?

    python3 deploy/preflight.py [--extra test|dev]

Standard library only, and syntax of Python 3.6: it runs before anything is installed, on interpreters that
are too old, to say so. Stops with reason and remedy, or leaves a complete `.venv` behind. When the stamp in
`.venv` matches, it starts no other process and is done at once.
"""

import argparse
import ast
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON_MIN, PYTHON_MAX = (3, 11), (3, 13)
MEMORY_BYTES = 8 * 10**9
DISK_BYTES = 10 * 10**9  # to install and run
DISK_INSTALLED_BYTES = 2 * 10**9  # to run
SHM_BYTES = 512 * 2**20
GLIBC_MIN = (2, 28)  # of the torch and NIXL wheels
EXTRAS = {"test": {"test"}, "dev": {"test", "dev"}}  # what each brings
DOWNLOAD = (
    "about 0.5 GB to download and 2.3 GB on disk (several GB more where the package index serves torch with CUDA)"
)
# Of pip's settings those that say where packages come from, in uv's words; and those that say nothing about it.
UV_WORDS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "cert": "SSL_CERT_FILE",  # in the environment
}
NOT_ABOUT_SOURCES = {"cache-dir", "default-timeout", "disable-pip-version-check", "no-cache-dir", "no-input"}
NOT_ABOUT_SOURCES |= {"progress-bar", "require-virtualenv", "retries", "root-user-action", "timeout"}
# Most files of packages are never imported. Those of these are, and compiled by several processes at once; the
# others as they are imported.
COMPILE = """
import compileall, sysconfig
for package in ("ray", "torch"):
    compileall.compile_dir(sysconfig.get_path("purelib") + "/" + package, quiet=2, workers=0)
"""


class Machine(NamedTuple):
    """What was found; None where the system does not tell."""

    system: str
    architecture: str
    python: tuple
    has_venv: bool
    glibc: Optional[tuple]
    memory_bytes: Optional[int]
    disk_bytes: Optional[int]
    shm_bytes: Optional[int]


class Problem(NamedTuple):
    reason: str
    remedy: str


def problems(machine: Machine, installed: bool = False) -> List[Problem]:
    """Everything that keeps sluice from running here. `installed`: the packages are on disk already."""
    if machine.system != "Linux" or machine.architecture != "x86_64":
        return [
            Problem(
                "this is {} on {}; sluice runs on Linux x86-64".format(machine.system, machine.architecture),
                "use a Linux x86-64 machine or container, e.g. "
                'docker run --platform linux/amd64 --shm-size 2g -it -v "$PWD":/sluice -w /sluice python:3.11 bash',
            )
        ]
    found = []
    if not PYTHON_MIN <= machine.python[:2] <= PYTHON_MAX:
        found.append(
            Problem(
                "this is Python {}.{}; sluice needs 3.11, 3.12 or 3.13".format(*machine.python[:2]),
                "install one of them (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) and have it on PATH",
            )
        )
    elif not machine.has_venv and not installed:
        found.append(
            Problem(
                "the venv module of Python {}.{} is missing".format(*machine.python[:2]),
                "Debian, Ubuntu: apt-get install python{}.{}-venv".format(*machine.python[:2]),
            )
        )
    if machine.glibc is not None and machine.glibc < GLIBC_MIN:
        found.append(
            Problem(
                "the C library is {}; the binary packages need glibc 2.28 or newer".format(_dotted(machine.glibc)),
                "use a system with glibc, e.g. Debian 10 or newer (Alpine's musl does not work)",
            )
        )
    if machine.memory_bytes is not None and machine.memory_bytes < MEMORY_BYTES:
        found.append(
            Problem(
                "{} of memory; sluice needs {}".format(_gb(machine.memory_bytes), _gb(MEMORY_BYTES)),
                "use a larger machine, or raise the container's memory limit",
            )
        )
    disk_needed = DISK_INSTALLED_BYTES if installed else DISK_BYTES
    if machine.disk_bytes is not None and machine.disk_bytes < disk_needed:
        found.append(
            Problem(
                "{} free on the disk of {}; sluice needs {}".format(_gb(machine.disk_bytes), ROOT, _gb(disk_needed)),
                "free some space, or clone to another disk",
            )
        )
    if machine.shm_bytes is not None and machine.shm_bytes < SHM_BYTES:
        found.append(
            Problem(
                "{} free in /dev/shm; sluice needs {}".format(_gb(machine.shm_bytes), _gb(SHM_BYTES)),
                "container: start it with --shm-size 2g; else: mount -o remount,size=2g /dev/shm",
            )
        )
    return found


def probe() -> Machine:
    modules = ("venv", "ensurepip")
    return Machine(
        system=platform.system(),
        architecture={"AMD64": "x86_64"}.get(platform.machine(), platform.machine()),
        python=tuple(sys.version_info[:3]),
        has_venv=all(importlib.util.find_spec(name) is not None for name in modules),
        glibc=_glibc(),
        memory_bytes=memory_bytes("/proc", "/sys/fs/cgroup"),
        disk_bytes=_free_bytes(ROOT),
        shm_bytes=_free_bytes("/dev/shm"),
    )


def memory_bytes(proc: str, cgroup: str) -> Optional[int]:
    """The machine's memory, or the smallest limit of our own cgroup and those above it, if less."""
    sizes = []
    for line in _lines(os.path.join(proc, "meminfo")):
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    for line in _lines(os.path.join(proc, "self", "cgroup")):
        _, controllers, path = line.strip().split(":", 2)
        if controllers == "":
            base, name = cgroup, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = os.path.join(cgroup, "memory"), "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            for limit in _lines(os.path.join(base, *parts[:depth], name)):
                if limit.strip().isdigit():
                    sizes.append(int(limit))
    return min(sizes) if sizes else None


def stamp(root: str, venv: str) -> Optional[str]:
    """What an installation in `venv` depends on; None: there is no usable environment to install into."""
    version = [
        line.split("=")[1].strip() for line in _lines(os.path.join(venv, "pyvenv.cfg")) if line.startswith("version")
    ]
    usable = version and PYTHON_MIN <= tuple(int(part) for part in version[0].split(".")[:2]) <= PYTHON_MAX
    if not usable or not os.path.exists(os.path.join(venv, "bin", "python")):
        return None
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    digest.update("{}\0{}".format(os.path.realpath(root), version[0]).encode())
    return digest.hexdigest()


def read_stamp(venv: str) -> tuple:
    """(stamp, extras) of the last complete installation."""
    lines = _lines(os.path.join(venv, ".sluice-stamp"))
    return (lines[0].strip(), set(lines[1].split())) if len(lines) == 2 else ("", set())


def install(extras: Set[str]) -> int:
    """Brings `.venv` up to date; 0 if it is. Safe to run twice at once: the second one waits."""
    import fcntl  # absent on systems that problems() has refused by now

    os.makedirs(os.path.join(ROOT, ".cache"), exist_ok=True)
    with open(os.path.join(ROOT, ".cache", "setup.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted, (last, present) = stamp(ROOT, VENV), read_stamp(VENV)
        if wanted is not None and wanted == last and extras <= present:
            return 0
        print("Setting up .venv: {}.".format(DOWNLOAD), flush=True)
        python = os.path.join(VENV, "bin", "python")
        if wanted is None and subprocess.call([sys.executable, "-m", "venv", "--clear", VENV]) != 0:
            return _stop("the environment could not be made", "remove .venv and look at the message above")
        extras = extras | present
        target = "{}[{}]".format(ROOT, ",".join(sorted(extras))) if extras else ROOT
        if not _load(python, target):
            return _stop("pip did not finish", "look at its message above; what it has loaded so far is kept")
        if not sys.dont_write_bytecode:
            subprocess.call([python, "-c", COMPILE])
        with open(os.path.join(VENV, ".sluice-stamp"), "w") as file:
            file.write("{}\n{}\n".format(stamp(ROOT, VENV), " ".join(sorted(extras))))
        print("Set up.", flush=True)
    return 0


def uv_settings(pip_config: str) -> Optional[Tuple[List[str], Dict[str, str]]]:
    """Options and environment that tell uv what `pip config list` says of where packages come from; None: it says what
    uv has no word for."""
    options, environment = ["--index-strategy", "unsafe-best-match"], {}  # the best of all indexes, as pip has it
    for line in pip_config.splitlines():
        name, _, quoted = line.partition("=")
        name = name.rpartition(".")[2].replace("_", "-")
        for value in str(ast.literal_eval(quoted)).split() if name in UV_WORDS else []:
            if UV_WORDS[name].startswith("--"):
                options += [UV_WORDS[name], value]
            else:
                environment[UV_WORDS[name]] = value
        if name not in UV_WORDS and name not in NOT_ABOUT_SOURCES:
            return None
    return options, environment


def _load(python: str, target: str) -> bool:
    """Installs `target`, by uv, which downloads and unpacks side by side, else by pip; False if that failed."""
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    constraints = ["-c", os.path.join(ROOT, "constraints.txt")]
    settings = uv_settings(subprocess.check_output([*pip, "config", "list"], universal_newlines=True))
    if settings is not None and subprocess.call([*pip, "install", "-q", *constraints, "uv"]) == 0:
        uv = [os.path.join(os.path.dirname(python), "uv"), "pip", "install", "--python", python]
        environment = dict(os.environ, **settings[1])
        if subprocess.call([*uv, *settings[0], *constraints, "-e", target], cwd=ROOT, env=environment) == 0:
            return True
        print("uv did not finish; pip tries the same.", flush=True)
    compiling = [] if sys.dont_write_bytecode else ["--no-compile"]
    return subprocess.call([*pip, "install", *compiling, *constraints, "-e", target], cwd=ROOT) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Check this machine and set up .venv")
    parser.add_argument("--extra", choices=sorted(EXTRAS), help="which optional packages")
    extra = parser.parse_args().extra
    machine = probe()
    if not PYTHON_MIN <= machine.python[:2] <= PYTHON_MAX and machine.system == "Linux":
        for minor in range(PYTHON_MIN[1], PYTHON_MAX[1] + 1):
            other = shutil.which("python3.{}".format(minor))
            if other is not None and subprocess.call([other, "-c", ""], stderr=subprocess.DEVNULL) == 0:
                os.execv(other, [other, *sys.argv])
    installed = read_stamp(VENV)[0] != ""
    found = problems(machine, installed)
    for problem in found:
        _stop(problem.reason, problem.remedy)
    return 1 if found else install(EXTRAS.get(extra, set()))


def _stop(reason: str, remedy: str) -> int:
    print("sluice cannot run here: {}.\n  Remedy: {}.".format(reason, remedy), file=sys.stderr)
    return 1


def _lines(path: str) -> List[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:
        return []


def _free_bytes(path: str) -> Optional[int]:
    return shutil.disk_usage(path).free if os.path.isdir(path) else None


def _glibc() -> Optional[tuple]:
    """(0,) for another C library."""
    if not sys.platform.startswith("linux"):
        return None
    name, version = platform.libc_ver()
    if name == "glibc":
        return tuple(int(part) for part in version.split(".")[:2])
    return (0,) if "musl" in (sysconfig.get_config_var("MULTIARCH") or "") else None


def _dotted(version: tuple) -> str:
    return "glibc " + ".".join(str(part) for part in version) if version != (0,) else "not glibc"


def _gb(size: int) -> str:
    return "{:.1f} GB".format(size / 1e9)


if __name__ == "__main__":
    sys.exit(main())
