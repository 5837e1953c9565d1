"""Rules about files that no tool checks: sizes, names, who may import what, and that the names are ours."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "kvtransfer", "router", "workers", "deploy")
TORCH_FREE = (
    "cluster.config",
    "cluster.config_file",
    "cluster.hashing",
    "cluster.log",
    "cluster.membership",
    "cluster.metrics",
    "cluster.placement",
    "cluster.request",
    "cluster.rpc",
    "kvtransfer.layout",
    "kvtransfer.ledger",
    "router.plan",
    "workers.engine.block_manager",
    "workers.engine.scheduler",
    "workers.engine.sequence",
    "workers.engine.step_plan",
)
RAY_AWARE = (
    "cluster/actor_calls.py",
    "cluster/controller.py",
    "cluster/pool.py",
    "workers/actor.py",
    "deploy/",
    "tests/",
    "benchmarks/",
)


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if "_pb2" not in path.name and "__pycache__" not in path.parts)


ALL = python_files(*ROOMS, "tests", "benchmarks")


@cache
def trees() -> Mapping[str, ast.Module]:
    """By path; parsed when the first test asks, not whenever tests are collected."""
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(), str(path)) for path in ALL}


@cache
def nodes() -> Mapping[str, list[ast.AST]]:
    """Of all trees, at any depth; by path."""
    return {path: list(ast.walk(tree)) for path, tree in trees().items()}


def imports(nodes: list[ast.AST]) -> Iterator[str]:
    """The first name of everything imported absolutely."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def importers(*names: str) -> list[str]:
    return [path for path, inside in nodes().items() if not set(names).isdisjoint(imports(inside))]


def calls(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_there_is_something_to_check() -> None:
    assert {path.partition("/")[0] for path in trees()} >= {*ROOMS, "tests"}


def test_no_file_is_over_400_lines() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in ALL}
    assert {path: size for path, size in sizes.items() if size > 400} == {}


def test_files_are_nouns() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}
    assert [path for path in trees() if Path(path).stem in vague] == []


def test_only_one_file_imports_nixl() -> None:
    assert set(importers("nixl", "nixl_cu12", "nixl_cu13")) <= {"kvtransfer/nixl_transport.py"}


def test_few_files_import_ray() -> None:
    assert [path for path in importers("ray") if not path.startswith(RAY_AWARE)] == []


def test_names_of_transformers_come_from_their_own_modules() -> None:
    """Its root names everything: whoever imports from there has the type checker read all of it, for 10 seconds."""
    found = [
        f"{path}:{node.lineno}"
        for path, inside in nodes().items()
        for node in inside
        if isinstance(node, ast.ImportFrom) and node.module == "transformers"
    ]
    assert found == []


def test_nothing_is_pickled() -> None:
    assert importers("pickle", "cloudpickle", "dill", "marshal", "shelve") == []
    loads = [
        f"{path}:{line}"
        for path, inside in nodes().items()
        for line, name in calls(inside)
        if name in ("torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load")
    ]
    assert loads == []


def test_tests_never_sleep() -> None:
    sleeps = [
        f"{path}:{line}"
        for path, inside in nodes().items()
        if path.startswith("tests/")
        for line, name in calls(inside)
        if name in ("time.sleep", "sleep")
    ]
    assert sleeps == []


def test_no_bare_except() -> None:
    bare = [
        f"{path}:{node.lineno}"
        for path, inside in nodes().items()
        for node in inside
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_the_environment_is_read_at_the_edges_only() -> None:
    """Third-party libraries read it, and secrets come from it; nothing deep inside does."""
    allowed = (
        "deploy/",
        "tests/",
        "benchmarks/",
        "workers/actor.py",
        "workers/standalone.py",
        "kvtransfer/nixl_transport.py",
    )
    readers = [
        f"{path}:{node.lineno}"
        for path, inside in nodes().items()
        if not path.startswith(allowed)
        for node in inside
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]
    assert readers == []


def test_torch_free_modules_start_without_torch() -> None:
    """In one fresh interpreter: import-linter does not see what a package's __init__ pulls in."""
    present = [name for name in TORCH_FREE if (ROOT / (name.replace(".", "/") + ".py")).exists()]
    code = (
        f"import sys, {', '.join(present)}\n"
        "print(*sorted({'torch', 'ray', 'nixl', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_five_names_are_ours() -> None:
    others = [folder for folder in map(Path, sys.path) if folder.resolve() != ROOT]
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        assert spec is not None and spec.origin == str(ROOT / room / "__init__.py"), room
        assert [path for folder in others for path in (folder / room, folder / f"{room}.py") if path.exists()] == []


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    present = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == present
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in python_files(*ROOMS)}
    assert folders == present, "a folder with modules needs an __init__.py"


def test_pins_are_exact_and_cover_what_we_ask_for() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==([0-9]+!)?[0-9][A-Za-z0-9.]*", pin)] == []
    pinned = {_plain(pin.partition("==")[0]) for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"], *extras["dev"]]
    names = {_plain(re.split(r"[\[<>=~!; ]", requirement)[0]) for requirement in asked} - {"sluice"}
    assert names - pinned == set()


def test_docs_say_nothing_unfinished_and_no_path_of_one_machine() -> None:
    unwanted = re.compile(r"\b(TODO|FIXME|XXX|TBD)\b|/work/(main|shared)|/home/\w+/|/tmp/w/")
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.yaml"), *ALL]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unwanted.search(line)
    ]
    assert found == []


def test_no_package_index_or_image_registry_is_named() -> None:
    """Where packages and images come from is the business of who installs them."""
    host = re.compile(
        r"(?<![\w@.])(?:[a-z0-9-]+\.)+(?:io|org|com|net|dev)/(?:whl|simple|wheels)\b|pythonhosted|\bpypi\.org"
    )
    registry = re.compile(r"\b(?:docker|ghcr|nvcr|quay|gcr)\.io\b|\bregistry\.(?:[a-z0-9-]+\.)+[a-z]+")
    rooms = [ROOT / room for room in (*ROOMS, "helm", "docs", ".ci")]
    files = [
        path for room in rooms for path in room.rglob("*") if path.is_file() and path.suffix not in {".png", ".pyc"}
    ]
    files += [ROOT / name for name in ("Makefile", "README.md", "pyproject.toml", "constraints.txt")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    assert [name for name, text in texts.items() if host.search(text) or registry.search(text)] == []


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_says_what_it_is(room: str) -> None:
    assert ast.get_docstring(trees()[f"{room}/__init__.py"])
