"""What every test shares: capped threads, a quiet Ray, hardware markers, and no skip that is not listed."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Before torch, Ray or transformers are imported by any test, and inherited by the processes tests start.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

SHARING = ("tests/cluster", "tests/deploy/public")  # in each folder, files that want a cluster share one
MAX_CLUSTERS = 2
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


class SkipGuard:
    """Fails the run when a test was skipped, or expected to fail, for a reason that is not listed."""

    def __init__(self, allowed: list[re.Pattern[str]]) -> None:
        self.allowed = allowed
        self.unlisted: list[str] = []

    def see(self, nodeid: str, reason: str) -> None:
        if not any(pattern.search(reason) for pattern in self.allowed):
            self.unlisted.append(f"{nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.see(report.nodeid, _skip_reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.see(report.nodeid, _skip_reason(report))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section("skips that tests/allowed_skips.txt does not list", red=True, bold=True)
            for line in self.unlisted:
                terminalreporter.line(line)


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    expected_failure = getattr(report, "wasxfail", None)
    if expected_failure is not None:
        return f"expected to fail: {expected_failure}"
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def read_allowed_skips(text: str) -> list[re.Pattern[str]]:
    lines = (line.strip() for line in text.splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long form: every model family everywhere, every death")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipGuard(read_allowed_skips(ALLOWED_SKIPS.read_text())), "skip-guard")


class Lanes(LoadScopeScheduling):
    """Under xdist, tests of one file, or folder, run one after the other in one process, as they share a cluster.

    The first process begins with the files that start clusters, the slow ones first; all others with the quick ones,
    which fill the time that clusters wait. More clusters than two at a time want more than 8 GB.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return folder if folder in SHARING and self._marked(file, "cluster") else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        scope = self._best_for(node)
        if scope is None:
            node.shutdown()
            return
        self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)

    def _best_for(self, node: WorkerController) -> str | None:
        may_start = sum(self._has_clusters(other) for other in self.nodes if other is not node) < MAX_CLUSTERS
        allowed = [scope for scope in self.workqueue if may_start or not self._marked(scope, "cluster")]
        is_first = node.gateway.id == "gw0"

        def rank(scope: str) -> tuple[bool, bool]:
            return self._marked(scope, "cluster") != is_first, not self._marked(scope, "slow")

        return min(allowed, key=rank, default=None)

    def _has_clusters(self, node: WorkerController) -> bool:
        units = self.assigned_work[node].items()
        return any(self._marked(scope, "cluster") and not all(unit.values()) for scope, unit in units)

    def _marked(self, scope: str, mark: str) -> bool:
        """Whether a file of it names the mark: of the tests, this process knows no more than where they are."""
        place = self.config.rootpath / scope
        return any(f"mark.{mark}" in _text(file) for file in (place.glob("test_*.py") if place.is_dir() else [place]))


@cache
def _text(file: Path) -> str:
    return file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    return Lanes(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    has_netns = os.geteuid() == 0 and shutil.which("ip") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("netns") and not has_netns:
            item.add_marker(pytest.mark.skip(reason="needs root and iproute2 for network namespaces"))
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)  # stable: the quick ones first
