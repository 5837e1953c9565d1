"""What Kubernetes asks of a pod, with the standard library alone: the exit status is the answer.

    pod_health.py live   [--head] [--ports MIN-MAX] [--stalled-s S]   Ray answers; with ports: and nobody is stalled
    pod_health.py ready  --public-port PORT                           a request sent to this pod could be served now
    pod_health.py drain  --ports MIN-MAX --deadline-s S               takes the node out of Ray, returns when its
                                                                      workers are gone and nothing is open

Processes of sluice are found by what listens within the ports; those that answer GET /metrics tell their work there.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

RAYLET = "/api/local_raylet_healthz"
GCS = "http://127.0.0.1:8265/api/gcs_healthz"
STEPS = "sluice_engine_step_seconds_count"
RUNNING = "sluice_engine_running_sequences"
WORK = (
    "sluice_ingress_open_requests",
    RUNNING,
    "sluice_engine_waiting_sequences",
    "sluice_engine_pulling_sequences",
    "sluice_kv_leases",
)
BLOCKS = "sluice_kv_blocks{"  # of workers alone
_LISTENS = "0A"
_POLL_S = 0.5
_ANSWER_S = 2.0


def answers(url: str) -> bool:
    return _get(url) is not None


def processes(first: int, last: int) -> dict[str, dict[str, float]]:
    """Address -> its samples without labels, of every process here that tells metrics."""
    return {address: _samples(text) for address, text in _told(first, last).items()}


def stalled(now: dict[str, dict[str, float]], before: dict[str, list[float]], clock: float) -> dict[str, list[float]]:
    """Address -> [steps, since when] of those that have work; `before` is what this said the last time."""
    standing: dict[str, list[float]] = {}
    for address, samples in now.items():
        if samples.get(RUNNING, 0.0) > 0:
            steps = samples.get(STEPS, 0.0)
            old = before.get(address)
            standing[address] = old if old is not None and old[0] == steps else [steps, clock]
    return standing


def live(options: argparse.Namespace) -> str | None:
    """None, or what is wrong."""
    if not answers(f"http://127.0.0.1:{options.raylet_port}{RAYLET}"):
        return "the raylet does not answer"
    if options.head and not answers(GCS):
        return "the GCS does not answer"
    if options.ports is None:
        return None
    state = Path(options.state)
    try:
        before = json.loads(state.read_text())
    except (OSError, ValueError):
        before = {}
    clock = time.monotonic()
    standing = stalled(processes(*options.ports), before, clock)
    state.write_text(json.dumps(standing))
    late = [address for address, (_, since) in standing.items() if clock - since > options.stalled_s]
    return f"{late[0]} has work and has not stepped for {options.stalled_s:g} s" if late else None


def ready(options: argparse.Namespace) -> str | None:
    if not answers(f"http://127.0.0.1:{options.raylet_port}{RAYLET}"):
        return "the raylet does not answer"
    if not answers(f"http://127.0.0.1:{options.public_port}/health"):
        return "a request could not be served now"
    return None


def drain(options: argparse.Namespace) -> str | None:
    deadline = time.monotonic() + options.deadline_s
    command = [
        "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is told to go",
        "--deadline-remaining-seconds", str(int(options.deadline_s)),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=options.deadline_s)
        said = (done.stdout + done.stderr).strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        print(f"Ray did not drain the node: {said}", file=sys.stderr)  # Its processes may still become idle.
    while True:
        told = _told(*options.ports)
        samples = {address: _samples(text) for address, text in told.items()}
        busy = [address for address, each in samples.items() if any(each.get(name, 0.0) for name in WORK)]
        # The controller has read that the node is to go, and starts successors; until they serve, its workers do.
        staying = [] if said else [address for address, text in told.items() if BLOCKS in text]
        if not busy and not staying:
            return None
        if time.monotonic() >= deadline:
            which = "busy" if busy else "there"
            return f"still {which}: {', '.join(sorted(busy or staying))}"
        time.sleep(_POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raylet-port", type=int, default=52365, help="of the dashboard agent")
    questions = parser.add_subparsers(dest="question", required=True)
    one = questions.add_parser("live")
    one.add_argument("--head", action="store_true")
    one.add_argument("--ports", type=_range)
    one.add_argument("--stalled-s", type=float, default=120.0)
    one.add_argument("--state", default=os.path.join(tempfile.gettempdir(), "sluice-live.json"))
    one.set_defaults(ask=live)
    one = questions.add_parser("ready")
    one.add_argument("--public-port", type=int, required=True)
    one.set_defaults(ask=ready)
    one = questions.add_parser("drain")
    one.add_argument("--ports", type=_range, required=True)
    one.add_argument("--deadline-s", type=float, required=True)
    one.set_defaults(ask=drain)
    options = parser.parse_args()
    wrong = options.ask(options)
    if wrong is not None:
        sys.exit(wrong)


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash or not first.isdecimal() or not last.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no range of ports; write MIN-MAX")
    return int(first), int(last)


def _listening(first: int, last: int) -> list[str]:
    """host:port of listening sockets, as the kernel tells them; IPv6 only where it stands for all addresses."""
    found: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, _, state = line.split()[1:4]
            host, _, port = local.partition(":")
            if state != _LISTENS or not first <= int(port, 16) <= last:
                continue
            if len(host) == 8 and int(host, 16):
                found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(host))) + f":{int(port, 16)}")
            elif not int(host, 16):
                found.add(f"127.0.0.1:{int(port, 16)}")
    return sorted(found)


def _told(first: int, last: int) -> dict[str, str]:
    """Address -> what it tells, of every process here that tells metrics."""
    answers = {address: _get(f"http://{address}/metrics") for address in _listening(first, last)}
    return {address: text for address, text in answers.items() if text is not None and "sluice_" in text}


def _get(url: str) -> str | None:
    """None: no answer, or another one than 200. The words plane listens here, too, and speaks no HTTP/1."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_S) as answer:
            return answer.read().decode() if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _samples(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if line.startswith("sluice_") and "{" not in line)
    return {name: float(value) for name, value in (line.split()[:2] for line in lines)}


if __name__ == "__main__":
    main()
