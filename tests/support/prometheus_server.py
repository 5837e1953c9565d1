"""A real Prometheus, from Debian's package, that scrapes the processes of one app each second."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml

from helm.prometheus import Prometheus
from helm.readme import CHART

ROOT = Path(__file__).parents[2]
_UNPACKED = ROOT / ".cache" / "prometheus"
_BINARIES = f"{_UNPACKED / 'usr/bin'}:/usr/local/bin:/usr/bin"
_READY = "Server is ready to receive web requests"
WINDOW_S = 10.0  # of rates: ten scrapes


@cache
def server() -> str | None:
    """The binary: installed, or unpacked under .cache, fetched there first where Debian's tools are."""
    found = shutil.which("prometheus", path=_BINARIES)
    if found is None and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        _UNPACKED.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(["apt-get", "download", "-qq", "prometheus"], cwd=_UNPACKED, check=False)
        for package in _UNPACKED.glob("prometheus_*.deb"):
            if fetched.returncode == 0:
                subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=_UNPACKED, check=True)
            package.unlink()
        found = shutil.which("prometheus", path=_BINARIES)
    return found


@contextmanager
def prometheus(app_url: str, directory: Path) -> Iterator[Prometheus]:
    """Asks the app whom to scrape, as docs/kubernetes.md says for a Prometheus without the operator, and runs the
    chart's rules. Everything that it keeps lies in `directory`."""
    binary = server()
    assert binary is not None
    (directory / "rules.yaml").write_text((CHART / "files" / "rules.yaml").read_text())
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": "sluice",
                "http_sd_configs": [{"url": f"{app_url}/prometheus/targets", "refresh_interval": "1s"}],
            }
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = _free_port()
    process = subprocess.Popen(
        [
            binary,
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=series",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        cwd=directory,
        stderr=subprocess.PIPE,
        text=True,
    )
    written: list[str] = []
    ready = threading.Event()
    reader = threading.Thread(target=_read, args=(process, written, ready), daemon=True)
    reader.start()
    try:
        assert ready.wait(60) and process.poll() is None, "".join(written)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)
        reader.join(10)


def _read(process: subprocess.Popen[str], written: list[str], ready: threading.Event) -> None:
    """Its log, to the end: a full pipe would stop it."""
    assert process.stderr is not None
    for line in process.stderr:
        written.append(line)
        if _READY in line:
            ready.set()
    ready.set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
