"""The words plane between two processes: round trips of a Session, and tokens per second of one worker.

    python -m benchmarks.words [--round-trips 2000] [--steps 2000] [--sequences 128]

Prints one line each. The worker answers a Submit of one token at once, and a Submit of N > 1 tokens with
N steps of `--sequences` sequences; steps that wait are merged, so tokens, not frames, are what counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from uuid import uuid4

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
    with WordsThread() as words:
        worker = WordsServer(words, identity("worker", pb.WORKER), SECRET, Worker(num_sequences))
        print(worker.start(), flush=True)
        sys.stdin.read()


def measure(address: str, num_round_trips: int, num_steps: int, num_sequences: int) -> None:
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
        seconds.sort()
        p50, p99 = (1e3 * seconds[int(len(seconds) * q)] for q in (0.5, 0.99))
        print(f"round trip over three threads: p50 {p50:.3f} ms, p99 {p99:.3f} ms, {num_round_trips} times")

        ingress.awaited, ingress.num_frames = num_steps * num_sequences, 0
        started = time.perf_counter()
        ingress.session.send(submit(num_steps))
        ingress.arrived.acquire()
        took = time.perf_counter() - started
        print(
            f"tokens: {ingress.awaited / took:,.0f}/s, {num_steps} steps of {num_sequences} sequences "
            f"in {ingress.num_frames} frames, {took:.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trips", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.sequences)
        return
    command = [sys.executable, "-m", "benchmarks.words", "--serve", "--sequences", str(args.sequences)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            measure(worker.stdout.readline().strip(), args.round_trips, args.steps, args.sequences)
        finally:
            worker.kill()


if __name__ == "__main__":
    main()
