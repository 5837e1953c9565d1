"""deploy/Dockerfile, read as a container engine reads it; none is needed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from helm.readme import CHART
from tests.helm import image_steps
from tests.support import chart
from tests.support.dockerfile import ROOT, STAGES, lineage
from tests.support.image import NOT_RUN

TARGETS = ("cpu", "cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): version for name, _, version in (each.partition("==") for each in lines) if version
    }


def test_there_is_nothing_but_known_instructions() -> None:
    assert [name for name in STAGES if name in TARGETS] == ["cuda", "cpu"]
    assert list(STAGES)[-1] == "cpu", "what is built when no target is named"
    known = {"ENV", "ARG", "WORKDIR", "COPY", "RUN", "CMD", "USER"}
    assert {name for stage in STAGES.values() for name, _ in stage.steps} == known


def test_the_base_is_one_exact_version_that_the_project_takes() -> None:
    bases = {stage.base for stage in STAGES.values()} - STAGES.keys()
    (base,) = bases
    version = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-bookworm", base)
    assert version is not None and version[1] in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_ends_as_a_user_and_without_build_tools(target: str) -> None:
    steps = [step for stage in reversed(lineage(target)) for step in stage.steps]
    assert steps[-1] == ("USER", "1000:1000"), "as the pods of the chart are"
    runs = " ".join(text for name, text in steps if name == "RUN")
    assert re.search(r"\b(pip|gcc|g\+\+|build-essential|make|git|curl|cmake)\b", runs) is None
    assert "apt-get install" not in runs or ("--no-install-recommends" in runs and "rm -rf /var/lib/apt/lists" in runs)
    user = chart.pod_templates(chart.render({}))["head"]["spec"]["securityContext"]["runAsUser"]
    assert f"--uid {user} " in runs
    copied = [text for name, text in steps if name == "COPY"]
    assert f"--from=build-{target} /install /usr/local" in copied
    assert {text.split()[0] for text in copied if "--from" not in text} == {
        package for package in PACKAGES if "." not in package
    }


def test_the_context_is_what_is_copied_and_no_more() -> None:
    text = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text()
    first, *rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = {
        source
        for stage in STAGES.values()
        for text in stage.of("COPY")
        if "--from" not in text
        for source in text.split()[:-1]
    }
    assert first == "*" and let_in == sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert any(fnmatch("cluster/__pycache__", rule) for rule in rules)


def test_every_step_is_run_or_said_not_to_be() -> None:
    """By `.ci/run`, or by the long form of the tests."""
    with_steps = {name for name, stage in STAGES.items() if stage.of("RUN")}
    assert with_steps == {*image_steps.HERE, *image_steps.LATER} and NOT_RUN.keys() == {"build-cuda"}


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_installed_by_their_pins(target: str) -> None:
    (step,) = STAGES[f"build-{target}"].of("RUN")
    listing, _, install = step.partition(" && ")
    assert re.search(r"^pip install .*-c constraints\.txt -r requirements\.txt$", install)
    command = listing.rpartition(" > ")[0].replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, check=True, capture_output=True, text=True)
    extra = PROJECT["optional-dependencies"]["gpu"] if target == "cuda" else []
    assert done.stdout.splitlines() == [*PROJECT["dependencies"], *extra]


def test_whatever_the_packages_need_is_pinned_too() -> None:
    """So that two builds of an image hold the same. The extra for GPUs is not: its packages are not installed here."""
    pinned, seen = pins(), set()
    waiting = [(Requirement(each), "") for each in PROJECT["dependencies"]]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        # torch brings CUDA where the index serves it so; the index for the CPU does not.
        if name.startswith("nvidia-") or name in ("cuda-bindings", "cuda-toolkit", "cuda-pathfinder", "triton"):
            continue
        assert name in pinned, f"{name} is needed and not in constraints.txt"
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(each), wanted) for each in requires(name) or []]
    assert len(seen) > 60


def test_chart_image_and_project_have_one_version() -> None:
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {described["version"], described["appVersion"], chart.defaults()["image"]["tag"]} == {PROJECT["version"]}
    assert chart.defaults()["ray"]["version"] == pins()["ray"]
    environment = " ".join(STAGES["application"].of("ENV")).split()
    for each in chart.pod_templates(chart.render({}))["head"]["spec"]["containers"][0]["env"][:3]:
        assert f"{each['name']}={each['value']}" in environment


@pytest.mark.full
def test_pip_finds_every_package_of_the_image(tmp_path: Path) -> None:
    """The step of the CPU image without its last act: nothing is written. The index is the one at hand."""
    (step,) = STAGES["build-cpu"].of("RUN")
    step = re.sub(r" --prefix=\S+", "", step)
    step = step.replace("pip install", f"{sys.executable} -m pip install --dry-run --ignore-installed --no-deps -q")
    step = step.replace("python -c", f"{sys.executable} -c", 1)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(["bash", "-c", step], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
