"""What the sessions of a large cluster cost: every ingress has one with every worker, over real gRPC.

    python -m benchmarks.sessions [--ingresses 8] [--workers 64] [--hosts 4] [--seconds 10] [--rate 20] [--json FILE]

Each ingress is a process of its own. The workers' ends share `--hosts` processes, each with one event loop and one
heart: a worker's memory here is what its sessions add, not what an interpreter takes. Nobody computes anything; under
load every worker sends each ingress a frame with the tokens of 32 sequences, `--rate` times a second. Then one host of
workers is killed: how long after that the last ingress has heard of all sessions with it. CPU is of the processes'
own account, in shares of a core; with more processes than cores, times are those of a busy machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import psutil

from benchmarks.report import Figure, Report, Setting, publish
from cluster.errors import SessionError
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, WordsServer, WordsThread
from cluster.session import Session
from cluster.words_config import WordsConfig

SECRET = b"benchmark"
NUM_SEQUENCES = 32
DEADLINE_S = 120.0
HEARTBEAT_S = WordsConfig().heartbeat_s

Address: TypeAlias = tuple[str, str]  # host:port, incarnation


class _End:
    """One worker's or one ingress's end of its sessions."""

    def __init__(self) -> None:
        self.sessions: set[Session] = set()
        self.broken_at: dict[str, float] = {}  # by peer; CLOCK_MONOTONIC is one clock for all processes of a machine
        self.num_broken = 0
        self.num_tokens = 0
        self.changed = threading.Condition()

    def peers(self) -> set[str]:
        return {session.peer.incarnation for session in self.sessions}

    def last_notice(self, killed: frozenset[str]) -> float:
        """When the last session with them broke."""
        with self.changed:
            assert self.changed.wait_for(lambda: not killed & self.peers(), DEADLINE_S), len(killed & self.peers())
            return max(self.broken_at[incarnation] for incarnation in killed)

    def on_open(self, session: Session) -> None:
        with self.changed:
            self.sessions.add(session)
            self.changed.notify_all()

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        self.num_tokens += sum(len(sequence.token_ids) for sequence in frame.step_tokens.sequences)

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None: ...

    def on_broken(self, session: Session, error: SessionError) -> None:
        with self.changed:
            self.sessions.discard(session)
            self.broken_at[session.peer.incarnation] = time.monotonic()
            self.num_broken += 1
            self.changed.notify_all()

    def on_overflow(self, session: Session, key: RequestKey) -> None:
        print(f"overflow of {key.request_id}", file=sys.stderr)


def _identity(name: str, kind: pb.PeerKind) -> pb.Identity:
    return pb.Identity(kind=kind, name=name, incarnation=uuid4().hex)


def _workers(pipe: Connection, names: Sequence[str]) -> None:
    """A process with the ends of several workers: tells where they listen; then "load", rate, seconds."""
    with WordsThread() as words:
        ends = [_End() for _ in names]
        identities = [_identity(name, pb.WORKER) for name in names]
        servers = [WordsServer(words, who, SECRET, end, ports=(0,)) for who, end in zip(identities, ends, strict=True)]
        pipe.send([(server.start(), who.incarnation) for server, who in zip(servers, identities, strict=True)])
        while (asked := pipe.recv()) != "end":
            rate, seconds = asked
            keys = [pb.RequestKey(request_id=f"request-{index:04}") for index in range(NUM_SEQUENCES)]
            started = time.monotonic()
            for step in range(int(rate * seconds)):
                for session in [session for end in ends for session in end.sessions]:
                    session.send_tokens(
                        step,
                        [pb.SequenceTokens(key=key, first_token_index=step, token_ids=[step]) for key in keys],
                    )
                time.sleep(max(0.0, started + (step + 1) / rate - time.monotonic()))
            pipe.send(time.monotonic() - started)


def _ingress(pipe: Connection, name: str, addresses: Sequence[Address]) -> None:
    """A process with one ingress: dials when told to, says when all sessions are open, how many tokens came and how
    many sessions broke, and when the last of those with the killed workers broke."""
    end = _End()
    with WordsThread() as words:
        dialer = Dialer(words, _identity(name, pb.INGRESS), SECRET, end)
        pipe.send(0.0)  # up
        pipe.recv()
        for address, incarnation in addresses:
            dialer.keep(address, incarnation)
        with end.changed:
            assert end.changed.wait_for(lambda: len(end.sessions) == len(addresses), DEADLINE_S), len(end.sessions)
        pipe.send(time.monotonic())
        while (asked := pipe.recv()) != "end":
            if asked == "counts":
                pipe.send((end.num_tokens, end.num_broken))
                continue
            pipe.send(end.last_notice(frozenset(asked)))


@dataclass(slots=True)
class _Process:
    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls, stack: ExitStack, target: object, *arguments: object) -> _Process:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)  # type: ignore[arg-type]
        process.start()
        stack.callback(process.kill)
        return cls(process, ours)

    @property
    def rss_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def hear(self) -> object:
        assert self.pipe.poll(DEADLINE_S), f"{self.process.name} has not answered within {DEADLINE_S:g} s"
        return self.pipe.recv()


def _shares(processes: Sequence[_Process], before: Sequence[float], seconds: float) -> float:
    """Cores that all of them together kept busy."""
    return sum(each.cpu_s - cpu_s for each, cpu_s in zip(processes, before, strict=True)) / seconds


def measure(num_ingresses: int, num_workers: int, num_hosts: int, seconds: float, rate: float) -> list[Figure]:
    names = [f"worker-{index}" for index in range(num_workers)]
    with ExitStack() as stack:
        hosts = [_Process.start(stack, _workers, names[index::num_hosts]) for index in range(num_hosts)]
        homes = [_addresses(host.hear()) for host in hosts]
        addresses = [address for home in homes for address in home]
        ingresses = [_Process.start(stack, _ingress, f"ingress-{index}", addresses) for index in range(num_ingresses)]
        everyone = [*hosts, *ingresses]
        for ingress in ingresses:
            ingress.hear()
        empty = [each.rss_bytes for each in everyone]
        started = time.monotonic()
        for ingress in ingresses:
            ingress.pipe.send("dial")
        opened_at = [_number(ingress.hear()) for ingress in ingresses]
        grown = sum(each.rss_bytes for each in everyone) - sum(empty)

        num_sessions = num_ingresses * num_workers
        cpu = [each.cpu_s for each in everyone]
        time.sleep(seconds)
        idle = [_shares(each, cpu[first:last], seconds) for each, first, last in _both(hosts, ingresses)]

        cpu = [each.cpu_s for each in everyone]
        for host in hosts:
            host.pipe.send((rate, seconds))
        took = max(_number(host.hear()) for host in hosts)
        loaded = [_shares(each, cpu[first:last], took) for each, first, last in _both(hosts, ingresses)]
        for ingress in ingresses:
            ingress.pipe.send("counts")
        counts = [_pair(ingress.hear()) for ingress in ingresses]
        num_tokens, num_broken = (sum(each) for each in zip(*counts, strict=True))

        for ingress in ingresses:
            ingress.pipe.send([incarnation for _, incarnation in homes[0]])
        killed_at = time.monotonic()
        hosts[0].process.kill()
        noticed_at = [_number(ingress.hear()) for ingress in ingresses]
    return [
        Figure("all sessions open", max(opened_at) - started, "s", note=f"{num_sessions}, dialed at once"),
        Figure("memory of a session", grown / num_sessions / 1e3, "kB", note="both ends, resident"),
        Figure("idle, an ingress", 100 * idle[1] / num_ingresses, "% core", note=f"{num_workers} sessions"),
        Figure("idle, a worker", 100 * idle[0] / num_workers, "% core", note=f"{num_ingresses} sessions"),
        Figure(
            "a heartbeat", 1e6 * sum(idle) / (2 * num_sessions / HEARTBEAT_S), "µs", note="sent, received and judged"
        ),
        Figure("loaded, an ingress", 100 * loaded[1] / num_ingresses, "% core", note=f"{rate:g} frames/s a session"),
        Figure("loaded, a worker", 100 * loaded[0] / num_workers, "% core", note=f"{NUM_SEQUENCES} tokens a frame"),
        Figure("tokens", num_tokens / took, "tok/s", num_sessions * rate * NUM_SEQUENCES, note="bound: offered"),
        Figure("sessions that broke", num_broken, "", note="with nobody dead: a machine that is too busy"),
        Figure("first notice", 1e3 * (min(noticed_at) - killed_at), "ms", note="the quickest ingress heard of all"),
        Figure(
            "last notice", 1e3 * (max(noticed_at) - killed_at), "ms", note=f"{len(homes[0])} workers killed at once"
        ),
    ]


def _both(hosts: list[_Process], ingresses: list[_Process]) -> list[tuple[list[_Process], int, int]]:
    return [(hosts, 0, len(hosts)), (ingresses, len(hosts), len(hosts) + len(ingresses))]


def _addresses(told: object) -> list[Address]:
    assert isinstance(told, list), told
    return told


def _pair(told: object) -> tuple[int, int]:
    assert isinstance(told, tuple), told
    return told


def _number(told: object) -> float:
    assert isinstance(told, (int, float)), told
    return told


def run(num_ingresses: int, num_workers: int, num_hosts: int, seconds: float, rate: float) -> Report:
    setting = Setting.here()
    figures = measure(num_ingresses, num_workers, num_hosts, seconds, rate)
    arguments = {
        "ingresses": num_ingresses,
        "workers": num_workers,
        "hosts": num_hosts,
        "seconds": seconds,
        "rate": rate,
    }
    return Report("sessions", "every ingress with every worker", arguments, figures, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ingresses", type=int, default=8)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--hosts", type=int, default=4, help="processes that hold the workers' ends")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0, help="frames a second on every session, under load")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    publish(run(options.ingresses, options.workers, options.hosts, options.seconds, options.rate), options.json)


if __name__ == "__main__":
    main()
