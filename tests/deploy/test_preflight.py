import ast
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import preflight
from deploy.preflight import Machine, memory_bytes, problems, read_stamp, stamp, uv_settings

FIT = Machine(
    system="Linux",
    architecture="x86_64",
    python=(3, 12, 1),
    has_venv=True,
    glibc=(2, 36),
    memory_bytes=16 * 10**9,
    disk_bytes=50 * 10**9,
    shm_bytes=2 * 10**9,
)


def test_a_fit_machine_has_no_problems() -> None:
    assert problems(FIT) == []
    assert problems(FIT._replace(memory_bytes=None, disk_bytes=None, shm_bytes=None, glibc=None)) == []
    assert problems(FIT._replace(python=(3, 11, 0))) == problems(FIT._replace(python=(3, 13, 9))) == []


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        ({"system": "Darwin", "architecture": "arm64"}, "Darwin on arm64", "docker run --platform linux/amd64"),
        ({"architecture": "aarch64"}, "Linux on aarch64", "x86-64"),
        ({"python": (3, 10, 2)}, "Python 3.10", "install one of them"),
        ({"python": (3, 14, 0)}, "Python 3.14", "install one of them"),
        ({"has_venv": False}, "venv module of Python 3.12", "apt-get install python3.12-venv"),
        ({"glibc": (0,)}, "not glibc", "Alpine"),
        ({"glibc": (2, 17)}, "glibc 2.17", "Debian 10"),
        ({"memory_bytes": 4 * 10**9}, "4.0 GB of memory", "memory limit"),
        ({"disk_bytes": 3 * 10**9}, "3.0 GB free on the disk", "free some space"),
        ({"shm_bytes": 64 * 2**20}, "0.1 GB free in /dev/shm", "--shm-size 2g"),
    ],
)
def test_each_problem_has_a_reason_and_a_remedy(change: dict[str, object], reason: str, remedy: str) -> None:
    (problem,) = problems(FIT._replace(**change))
    assert reason in problem.reason
    assert remedy in problem.remedy


def test_an_installed_tree_needs_less() -> None:
    assert problems(FIT._replace(disk_bytes=3 * 10**9, has_venv=False), installed=True) == []
    assert len(problems(FIT._replace(disk_bytes=10**9), installed=True)) == 1


def test_it_parses_on_old_interpreters_and_needs_nothing_installed() -> None:
    source = Path(preflight.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_it_names_no_registry() -> None:
    assert "://" not in Path(preflight.__file__).read_text()


def test_uv_is_told_where_pip_looks_for_packages() -> None:
    config = "global.index-url='a://b/simple'\nglobal.extra-index-url='c://d e://f'\n"
    config += "install.find-links='/x\\n/y'\n:env:.cert='/z.pem'\n:env:.default-timeout='180'\n"
    assert uv_settings(config) == (
        "--index-strategy unsafe-best-match --default-index a://b/simple --index c://d --index e://f "
        "--find-links /x --find-links /y".split(),
        {"SSL_CERT_FILE": "/z.pem"},
    )


@pytest.mark.parametrize("line", ["global.proxy='a://b'", ":env:.no-index='1'", "install.user='true'"])
def test_settings_that_uv_has_no_word_for_leave_it_to_pip(line: str) -> None:
    assert uv_settings(f"global.index-url='a://b'\n{line}\n") is None


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/a/b\n", {}, 8_000_000_000),
        ("0::/a/b\n", {"a/memory.max": "max", "a/b/memory.max": "max"}, 8_000_000_000),
        ("0::/a/b\n", {"a/memory.max": "1000", "a/b/memory.max": "2000"}, 1000),
        ("0::/\n", {"memory.max": "3000"}, 3000),
        ("0::/../outside\n", {"memory.max": "4000"}, 4000),
        ("5:cpu:/x\n4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "5000"}, 5000),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8_000_000_000),
    ],
)
def test_the_smallest_memory_limit_counts(tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  7812500 kB\nMemFree: 1 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, limit in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    assert memory_bytes(str(tmp_path / "proc"), str(tmp_path / "cgroup")) == expected


def make_tree(root: Path, version: str = "3.11.7") -> Path:
    (root / "pyproject.toml").write_text("a")
    (root / "constraints.txt").write_text("b")
    venv = root / ".venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "python").touch()
    (venv / "pyvenv.cfg").write_text(f"home = /x\nversion = {version}\n")
    return venv


def test_the_stamp_follows_what_an_installation_depends_on(tmp_path: Path) -> None:
    venv = make_tree(tmp_path)
    stamps = [stamp(str(tmp_path), str(venv))]
    assert stamps[0] == stamp(str(tmp_path), str(venv))
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("other")
        stamps.append(stamp(str(tmp_path), str(venv)))
    make_tree(tmp_path, "3.12.0")
    stamps.append(stamp(str(tmp_path), str(venv)))
    assert None not in stamps
    assert len(set(stamps)) == len(stamps)


def test_an_unusable_environment_has_no_stamp(tmp_path: Path) -> None:
    venv = make_tree(tmp_path, "3.9.1")
    assert stamp(str(tmp_path), str(venv)) is None
    make_tree(tmp_path)
    (venv / "bin" / "python").unlink()
    assert stamp(str(tmp_path), str(venv)) is None
    assert stamp(str(tmp_path), str(tmp_path / "nowhere")) is None


def test_a_torn_stamp_counts_as_none(tmp_path: Path) -> None:
    assert read_stamp(str(tmp_path)) == ("", set())
    (tmp_path / ".sluice-stamp").write_text("abc\n")
    assert read_stamp(str(tmp_path)) == ("", set())
    (tmp_path / ".sluice-stamp").write_text("abc\ndev test\n")
    assert read_stamp(str(tmp_path)) == ("abc", {"dev", "test"})


@pytest.mark.parametrize(
    ("words", "present"),
    [
        ((), ""),
        ((), "test"),
        (("--extra", "test"), "test"),
        (("--extra", "test"), "dev test"),
        (("--extra", "dev"), "dev test"),
    ],
)
def test_a_complete_environment_is_left_alone(tmp_path: Path, words: tuple[str, ...], present: str) -> None:
    """The script itself, in a tree whose stamp matches and whose `python` could not run: it starts nothing."""
    venv = make_tree(tmp_path)
    (tmp_path / "deploy").mkdir()
    script = tmp_path / "deploy" / "preflight.py"
    script.write_text(Path(preflight.__file__).read_text())
    (venv / ".sluice-stamp").write_text(f"{stamp(str(tmp_path), str(venv))}\n{present}\n")
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
