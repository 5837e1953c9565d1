from __future__ import annotations

import logging
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cluster import session as session_module
from cluster.errors import ConfigError, NobodyListens, SessionBroken, SessionError
from cluster.heart import StepAge
from cluster.parts import MAX_FRAME_BYTES
from cluster.protos import worker_pb2 as pb
from cluster.request import RequestKey
from cluster.rpc import Dialer, Session, WordsServer, WordsThread
from tests.support.words import (
    DEADLINE_S,
    SECRET,
    Pair,
    PeerProcess,
    Recorder,
    identity,
    open_pair,
    peer_process,
    raw_stream,
    submit,
    tokens,
    words_config,
)

INGRESS = identity("ingress-1", kind=pb.INGRESS)


@pytest.fixture
def words() -> Iterator[WordsThread]:
    with WordsThread(config=words_config()) as thread:
        yield thread


@pytest.fixture
def pair(words: WordsThread) -> Pair:
    return open_pair(words)


# ---------------------------------------------------------------- sessions


def test_both_sides_learn_who_the_other_is(pair: Pair) -> None:
    assert pair.dialed.peer == pair.worker and pair.dialed.dialed
    assert pair.accepted.peer.name == "ingress-0" and not pair.accepted.dialed
    assert pair.dialed.epoch == pair.accepted.epoch == 1
    assert pair.dialed.id != pair.accepted.id
    assert pair.dialer.sessions() == [pair.dialed] and pair.server.sessions() == [pair.accepted]
    assert pair.dialer.error(pair.worker.incarnation) is None


def test_frames_of_any_size_arrive_whole_and_in_order(pair: Pair) -> None:
    frames = [submit("r", num_tokens) for num_tokens in (1, 200_000, 2, 90_000)]
    for frame in frames:
        pair.accepted.send(frame)
    pair.at_ingress.wait("frame", 4)
    assert [event.frame for event in pair.at_ingress.events if event.kind == "frame"] == frames
    assert frames[1].ByteSize() > 8 * MAX_FRAME_BYTES


def test_every_token_arrives_once_and_in_order(pair: Pair) -> None:
    pair.dialed.send(submit("r", 5000))
    assert pair.at_ingress.wait_tokens(5000) == list(range(1, 5001))


def test_bulk_messages_travel_both_ways(pair: Pair) -> None:
    assert pair.accepted.send_bulk("events", b"e" * 200_000) and pair.accepted.send_bulk("events", b"")
    assert pair.dialed.send_bulk("result", b"r")
    first, second = pair.at_ingress.wait("bulk"), pair.at_ingress.wait("bulk", 2)
    assert (first.topic, first.payload, second.payload) == ("events", b"e" * 200_000, b"")
    assert pair.at_worker.wait("bulk").topic == "result"


def test_tokens_do_not_wait_behind_bulk_dumps(pair: Pair) -> None:
    accepted = pair.accepted

    def send() -> None:  # on the words thread: nothing is written before all is queued
        for _ in range(3):
            assert accepted.send_bulk("dump", bytes(3 << 20))
        for i in range(20):
            accepted.send_tokens(i, [tokens(RequestKey(str(i), 0), 0, i)])

    pair.words.post(send)
    pair.at_ingress.wait("bulk", 3)
    kinds = [event.kind for event in pair.at_ingress.events]
    assert pair.at_ingress.tokens() == list(range(20))
    assert "frame" not in kinds[kinds.index("bulk") :]


def test_a_closed_session_is_reported_once_to_each_side_and_dialed_again(pair: Pair) -> None:
    pair.dialed.send_bulk("t", b"")
    pair.at_worker.wait("bulk")  # both streams are up
    pair.accepted.close("a test")
    pair.accepted.close("again")
    closed, gone = pair.at_worker.wait("broken").error, pair.at_ingress.wait("broken").error
    assert closed is not None and closed.reason == "closed" and "closed here: a test" in str(closed)
    assert gone is not None and gone.reason == "gone" and "closed here: a test" in str(gone)
    again = pair.at_ingress.wait("open", 2).session
    assert again.epoch > pair.dialed.epoch and again.open and not pair.dialed.open
    pair.dialed.send(submit())  # into the void
    again.send(submit("later"))
    assert pair.at_worker.wait("frame").frame.submit.key.request_id == "later"
    pair.dialer.stop()
    pair.at_worker.wait("broken", 2)
    assert pair.at_ingress.count("open") == pair.at_ingress.count("broken") == 2
    assert pair.at_worker.count("open") == pair.at_worker.count("broken") == 2


def test_a_dropped_peer_is_not_dialed_again(pair: Pair) -> None:
    pair.dialer.drop(pair.worker.incarnation)
    assert "was dropped" in str(pair.at_ingress.wait("broken").error)
    pair.at_worker.wait("broken")
    assert pair.dialer.sessions() == [] and pair.at_ingress.count("open") == 1


@pytest.mark.parametrize("stopped", ["server", "dialer"])
def test_stop_can_wait_for_what_is_queued(pair: Pair, stopped: str) -> None:
    at_worker_end, at_ingress_end = pair.accepted, pair.dialed
    sender, reader = (at_worker_end, pair.at_ingress) if stopped == "server" else (at_ingress_end, pair.at_worker)
    for i in range(500):
        sender.send_tokens(i, [tokens(RequestKey(str(i), 0), 0, i)])
    large = pb.Submit(key=pb.RequestKey(request_id="large"), emitted_token_ids=range(300_000))  # no prompt to echo
    sender.send(pb.Frame(submit=large))
    sender.send_bulk("late", bytes(1 << 20))
    (pair.server if stopped == "server" else pair.dialer).stop(flush_s=10)
    reader.wait("broken")
    assert reader.tokens() == list(range(500))
    assert [len(event.payload) for event in reader.events if event.kind == "bulk"] == [1 << 20]
    assert [event.kind for event in reader.events if event.frame.HasField("submit")] == ["frame"]


class Busy(Recorder):
    """Does not get past its first frame, nor its thread to reading on, before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()

    def on_frame(self, session: Session, frame: pb.Frame) -> None:
        super().on_frame(session, frame)
        assert self.may_go_on.wait(DEADLINE_S)


def _close_in_a_write(words: WordsThread, session: Session) -> None:
    """Closes a session in the very turn of its loop in which a frame began to be written."""

    def close() -> None:
        if session.num_queued_frames:
            words.post(close)
        else:
            session.finish("a test")

    def send() -> None:
        session.send(submit("last"))
        close()

    words.post(send)


def test_a_write_that_is_on_its_way_when_the_dialer_closes_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = words_config(heartbeat_timeout_s=60.0)
    with WordsThread(config=config) as ours, WordsThread(config=config) as theirs:
        at_worker, at_ingress = Busy(), Recorder()
        address = WordsServer(theirs, identity(), SECRET, at_worker).start()
        Dialer(ours, INGRESS, SECRET, at_ingress).keep(address)
        for number, grace_s in ((1, 3600.0), (2, 0.05)):
            monkeypatch.setattr(session_module, "_FINISH_GRACE_S", grace_s)
            session = at_ingress.wait("open", number).session
            for index in range(200):
                session.send(submit(f"r{index}"))
            at_worker.wait("frame", 201 * number - 200)
            ours.wait(session.flush())  # into the connection; its peer has read one
            _close_in_a_write(ours, session)
            if number == 2:
                ours.wait(session.gone())  # a peer that does not read is not waited for
            at_worker.may_go_on.set()
            error = at_worker.wait("broken", number).error
            if number == 1:
                assert str(error) == "ingress-1 closed its stream" and at_worker.count("frame") == 201
            at_worker.may_go_on.clear()


def test_an_error_in_a_handler_ends_its_session_only(words: WordsThread) -> None:
    class Clumsy(Recorder):
        def on_frame(self, session: Session, frame: pb.Frame) -> None:
            raise ZeroDivisionError("a bug")

    clumsy, at_ingress, worker = Clumsy(), Recorder(), identity()
    address = WordsServer(words, worker, SECRET, clumsy).start()
    with raw_stream(address) as other:
        other.shake(INGRESS)
        Dialer(words, identity("ingress-0"), SECRET, at_ingress).keep(address)
        at_ingress.wait("open").session.send(submit())
        assert "ZeroDivisionError('a bug')" in str(clumsy.wait("broken").error)
        at_ingress.wait("open", 2)
        assert other.read_kind("heartbeat")


def test_one_dialer_keeps_sessions_to_several_workers(pair: Pair) -> None:
    other, at_other = identity("decode-1"), Recorder()
    address = WordsServer(pair.words, other, SECRET, at_other).start()
    assert address != pair.address
    pair.dialer.keep(address, other.incarnation)
    second = pair.at_ingress.wait("open", 2).session
    assert {session.peer.name for session in pair.dialer.sessions()} == {"decode-0", "decode-1"}
    second.send(submit("for the other"))
    assert at_other.wait("frame").frame.submit.key.request_id == "for the other"
    assert pair.at_worker.count("frame") == 0


# ---------------------------------------------------------------- ports


def test_taken_ports_are_skipped(words: WordsThread) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = range(port, port + 50)
        first, second = (WordsServer(words, identity(), SECRET, Recorder(), ports=ports).start() for _ in range(2))
        assert int(first.rsplit(":", 1)[1]) in ports and int(second.rsplit(":", 1)[1]) in ports
        assert len({first, second, f"127.0.0.1:{port}"}) == 3
        with pytest.raises(ConfigError, match=f"no free port among 1 from {port} on 127.0.0.1"):
            WordsServer(words, identity(), SECRET, Recorder(), ports=[port]).start()


# ---------------------------------------------------------------- refusals


class Refusals(logging.Handler):
    """Counts what listeners write about sessions they refused."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        if "refused a session" in record.getMessage():
            self.seen.release()


def test_another_secret_is_refused_and_told_once(words: WordsThread, pair: Pair) -> None:
    told: queue.SimpleQueue[tuple[str, SessionError]] = queue.SimpleQueue()
    refusals, at_stranger = Refusals(), Recorder()
    logging.getLogger("cluster.rpc").addHandler(refusals)
    stranger = Dialer(words, INGRESS, b"wrong", at_stranger, on_failed=lambda *args: told.put(args))
    stranger.keep(pair.address, pair.worker.incarnation)
    assert all(refusals.seen.acquire(timeout=DEADLINE_S) for _ in range(3))  # it goes on dialing
    logging.getLogger("cluster.rpc").removeHandler(refusals)
    assert stranger.error(pair.worker.incarnation)
    stranger.stop()
    who, error = told.get(timeout=DEADLINE_S)
    assert who == pair.worker.incarnation
    assert error.code == pb.UNAUTHENTICATED and "set the same secret" in str(error)
    assert told.empty() and not at_stranger.events
    assert pair.dialed.open and pair.at_worker.count("open") == 1


def test_a_port_where_nobody_listens_is_told_apart_from_one_that_hangs_up(words: WordsThread) -> None:
    told: queue.SimpleQueue[tuple[str, SessionError]] = queue.SimpleQueue()
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as rude:
        closed.bind(("127.0.0.1", 0))  # a port that stays free of others

        def hang_up() -> None:
            while True:
                try:
                    rude.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        dialer = Dialer(words, INGRESS, SECRET, Recorder(), on_failed=lambda *args: told.put(args))
        for name, listener in (("closed", closed), ("rude", rude)):
            dialer.keep(f"127.0.0.1:{listener.getsockname()[1]}", name)
        errors: dict[str, SessionError] = {}
        while len(errors) < 2:
            name, error = told.get(timeout=DEADLINE_S)
            errors[name] = error
        dialer.stop()
        rude.shutdown(socket.SHUT_RDWR)
    assert isinstance(errors["closed"], NobodyListens)
    assert isinstance(errors["rude"], SessionBroken) and not isinstance(errors["rude"], NobodyListens)


def test_a_restarted_worker_at_the_same_address_is_not_mistaken_for_the_old_one(words: WordsThread, pair: Pair) -> None:
    at_ingress = Recorder()
    failed: queue.SimpleQueue[SessionError] = queue.SimpleQueue()
    dialer = Dialer(words, INGRESS, SECRET, at_ingress, on_failed=lambda _, error: failed.put(error))
    dialer.keep(pair.address, "f" * 32)
    assert "answers as incarnation" in str(failed.get(timeout=DEADLINE_S))
    dialer.keep(pair.address)  # whoever answers there
    assert at_ingress.wait("open").session.peer.incarnation == pair.worker.incarnation
    dialer.stop()
    assert at_ingress.count("open") == 1 and failed.empty()


def test_an_engine_that_hangs_ends_its_sessions_and_admits_no_new_ones() -> None:
    age = StepAge(0.1, True)
    with WordsThread(lambda: age, words_config()) as words, WordsThread(config=words_config()) as ours:
        failed: queue.SimpleQueue[SessionError] = queue.SimpleQueue()
        at_ingress, worker = Recorder(), identity()
        address = WordsServer(words, worker, SECRET, Recorder()).start()
        dialer = Dialer(ours, INGRESS, SECRET, at_ingress, on_failed=lambda _, error: failed.put(error))
        dialer.keep(address, worker.incarnation)
        at_ingress.wait("open")
        age = StepAge(7.0, True)
        assert "no step for 7.0 s with work waiting" in str(at_ingress.wait("broken").error)
        assert "has work but no step for 5 s; dial again later" in str(failed.get(timeout=DEADLINE_S))
        age = StepAge(0.0, True)
        at_ingress.wait("open", 2)


# ---------------------------------------------------------------- processes


@pytest.fixture
def process() -> Iterator[PeerProcess]:
    with peer_process() as peer:
        yield peer


def _keep(words: WordsThread, process: PeerProcess) -> tuple[Dialer, Recorder]:
    at_ingress = Recorder()
    dialer = Dialer(words, INGRESS, SECRET, at_ingress)
    dialer.keep(process.address, process.incarnation)
    at_ingress.wait("open").session.send(submit("r", 10))
    assert at_ingress.wait_tokens(10) == list(range(1, 11))
    return dialer, at_ingress


@pytest.mark.chaos
def test_a_killed_peer_breaks_the_session_once(words: WordsThread, process: PeerProcess) -> None:
    dialer, at_ingress = _keep(words, process)
    process.process.kill()
    error = at_ingress.wait("broken").error
    assert error is not None and error.reason == "gone" and "decode-0 broke: UNAVAILABLE" in str(error)
    dialer.stop()
    assert at_ingress.count("broken") == at_ingress.count("open") == 1


@pytest.mark.chaos
def test_a_frozen_peer_is_lost_by_its_silence(words: WordsThread, process: PeerProcess) -> None:
    dialer, at_ingress = _keep(words, process)
    process.process.send_signal(signal.SIGSTOP)
    error = at_ingress.wait("broken").error
    assert error is not None and error.reason == "silent" and "no heartbeat for 1.00 s" in str(error)
    process.process.send_signal(signal.SIGCONT)
    at_ingress.wait("open", 2)
    dialer.stop()
    assert at_ingress.count("broken") == 2


@pytest.mark.chaos
@pytest.mark.parametrize("stops", [True, False])
def test_a_process_ends_without_noise(stops: bool, process: PeerProcess) -> None:
    """Also one that forgets to stop."""
    script = f"""
from tests.support.words import *
from cluster.rpc import Dialer
words, seen = WordsThread().start(), Recorder()
WordsServer(words, identity(), SECRET, Echo()).start()
dialer = Dialer(words, identity("ingress-0"), SECRET, seen)
dialer.keep({process.address!r})
seen.wait("open").session.send(submit("r", 9))
seen.wait_tokens(9)
if {stops}: words.stop()
"""
    command = [sys.executable, "-X", "dev", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    slow = re.compile(r"Executing <.*> took \d+\.\d+ seconds")  # what asyncio says of a slow machine
    told = [line for line in done.stderr.splitlines() if not slow.fullmatch(line)]
    assert (done.returncode, told, done.stdout) == (0, [], "")
