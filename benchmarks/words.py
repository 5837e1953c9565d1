"""The words plane between two processes: round trips of a Session, and tokens per second of one worker.

    python -m benchmarks.words [--round-trips 2000] [--steps 2000] [--sequences 128] [--json FILE]

The worker answers a Submit of one token at once, and a Submit of N > 1 tokens with N steps of `--sequences` sequences;
steps that wait are merged, so tokens, not frames, are what counts. Two bounds from the same run: a bare TCP echo
between the same two processes, one thread each; and what one core makes and reads of such frames without sending them.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

from benchmarks.report import ROOT, Figure, Report, Setting, percentile, publish
from cluster.errors import SessionError
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, Session, WordsServer, WordsThread

SECRET = b"benchmark"


class Worker:
    """Answers submits."""

    def __init__(self, num_sequences: int) -> None:
        self._keys = [pb.RequestKey(request_id=f"request-{i:04}") for i in range(num_sequences)]

    def on_open(self, session: Session) -> None: ...

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        num_steps = len(frame.submit.prompt_token_ids)
        if num_steps == 1:
            session.send_tokens(0, [pb.SequenceTokens(key=frame.submit.key, token_ids=[1])])
        else:
            threading.Thread(target=self._steps, args=(session, num_steps), daemon=True).start()

    def _steps(self, session: Session, num_steps: int) -> None:
        for step in range(num_steps):
            session.send_tokens(
                step, [pb.SequenceTokens(key=key, first_token_index=step, token_ids=[step]) for key in self._keys]
            )

    def on_bulk(self, session: Session, topic: str, payload: bytes) -> None: ...

    def on_broken(self, session: Session, error: SessionError) -> None: ...

    def on_overflow(self, session: Session, key: RequestKey) -> None:
        print(f"overflow of {key.request_id}", file=sys.stderr)


class Ingress(Worker):
    """Counts what comes back."""

    def __init__(self) -> None:
        super().__init__(0)
        self.opened = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.session: Session | None = None
        self.num_tokens = 0
        self.num_frames = 0
        self.awaited = 1

    def on_open(self, session: Session) -> None:
        self.session = session
        self.opened.set()

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        self.num_frames += 1
        self.num_tokens += sum(len(sequence.token_ids) for sequence in frame.step_tokens.sequences)
        if self.num_tokens >= self.awaited:
            self.num_tokens = 0
            self.arrived.release()


def identity(name: str, kind: pb.PeerKind) -> pb.Identity:
    return pb.Identity(kind=kind, name=name, incarnation=uuid4().hex)


def submit(num_tokens: int) -> pb.Frame:
    return pb.Frame(submit=pb.Submit(key=pb.RequestKey(request_id="r"), prompt_token_ids=[1] * num_tokens))


def serve(num_sequences: int) -> None:
    """In the worker's process: prints the addresses of its session server and of its echo."""
    with WordsThread() as words, socket.create_server(("127.0.0.1", 0)) as listener:
        worker = WordsServer(words, identity("worker", pb.WORKER), SECRET, Worker(num_sequences))
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        print(worker.start(), listener.getsockname()[1], flush=True)
        sys.stdin.read()


def echo(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while received := connection.recv(4096):
        connection.sendall(received)


def time_echo(port: int, num_round_trips: int) -> list[float]:
    """Seconds of each round trip."""
    message, seconds = submit(1).SerializeToString(), []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(num_round_trips):
            started = time.perf_counter()
            connection.sendall(message)
            connection.recv(4096)
            seconds.append(time.perf_counter() - started)
    return seconds


def frame_rate(num_sequences: int, num_frames: int = 200) -> float:
    """Tokens/s of making, writing and reading frames of one step; the best of three."""
    keys = [pb.RequestKey(request_id=f"request-{i:04}") for i in range(num_sequences)]
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for step in range(num_frames):
            sequences = [pb.SequenceTokens(key=key, first_token_index=step, token_ids=[step]) for key in keys]
            wire = pb.Frame(step_tokens=pb.StepTokens(step=step, sequences=sequences)).SerializeToString()
            assert sum(len(s.token_ids) for s in pb.Frame.FromString(wire).step_tokens.sequences) == num_sequences
        best = max(best, num_frames * num_sequences / (time.perf_counter() - started))
    return best


def measure(address: str, echo_port: int, num_round_trips: int, num_steps: int, num_sequences: int) -> list[Figure]:
    ingress = Ingress()
    with WordsThread() as words:
        Dialer(words, identity("ingress", pb.INGRESS), SECRET, ingress).keep(address)
        assert ingress.opened.wait(20) and ingress.session is not None
        seconds = []
        for _ in range(num_round_trips):
            started = time.perf_counter()
            ingress.session.send(submit(1))
            ingress.arrived.acquire()
            seconds.append(time.perf_counter() - started)
        bare = time_echo(echo_port, num_round_trips)

        ingress.awaited, ingress.num_frames = num_steps * num_sequences, 0
        started = time.perf_counter()
        ingress.session.send(submit(num_steps))
        ingress.arrived.acquire()
        took = time.perf_counter() - started
    figures = [
        Figure(
            f"round trip, {name}",
            1e3 * percentile(seconds, share),
            "ms",
            1e3 * percentile(bare, share),
            less_is_better=True,
            note=f"{num_round_trips} over three threads; bound: bare TCP",
        )
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]
    note = (
        f"{num_steps} steps of {num_sequences} in {ingress.num_frames} frames; bound: one core making and reading them"
    )
    return [*figures, Figure("tokens", ingress.awaited / took, "tok/s", frame_rate(num_sequences), note=note)]


def run(num_round_trips: int, num_steps: int, num_sequences: int) -> Report:
    setting = Setting.here()
    command = [sys.executable, "-m", "benchmarks.words", "--serve", "--sequences", str(num_sequences)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        try:
            assert worker.stdout is not None
            address, port = worker.stdout.readline().split()
            figures = measure(address, int(port), num_round_trips, num_steps, num_sequences)
        finally:
            worker.kill()
    arguments = {"round_trips": num_round_trips, "steps": num_steps, "sequences": num_sequences}
    return Report("words", "a session between two processes", arguments, figures, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trips", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.sequences)
    else:
        publish(run(options.round_trips, options.steps, options.sequences), options.json)


if __name__ == "__main__":
    main()
