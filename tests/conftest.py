"""What every test shares: capped threads, a quiet Ray, hardware markers, and no skip that is not listed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

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

PUBLIC = "tests/deploy/public"  # all its files share one cluster
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


class ByFile(LoadScopeScheduling):
    """Under xdist, tests of one file run one after the other in one process, as they share clusters."""

    def _split_scope(self, nodeid: str) -> str:
        return PUBLIC if nodeid.startswith(PUBLIC) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


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
