"""Mutual TLS of sessions: both sides are verified, whoever is not stays outside, and the worker lives on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cluster.errors import ConfigError
from cluster.protos import worker_pb2 as pb
from cluster.rpc import Dialer, WordsServer, WordsThread
from cluster.words_config import TlsConfig
from tests.support.certificates import Authority
from tests.support.words import DEADLINE_S, SECRET, Echo, Recorder, identity, raw_stream, submit, words_config


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@contextmanager
def thread(tls: dict[str, object] | None) -> Iterator[WordsThread]:
    with WordsThread(config=words_config(heartbeat_timeout_s=DEADLINE_S, tls=tls or {})) as words:
        yield words


@pytest.fixture(scope="module")
def worker(authority: Authority) -> Iterator[tuple[str, pb.Identity, Echo]]:
    """A listener with a good certificate, for every test here."""
    handler, who = Echo(), identity()
    with thread(authority.settings("worker")) as words:
        yield WordsServer(words, who, SECRET, handler).start(), who, handler


def talks(words: WordsThread, address: str, who: pb.Identity) -> bool:
    """Whether a session opens and a request is answered."""
    at_ingress = Recorder()
    dialer = Dialer(words, identity("ingress-0", kind=pb.INGRESS), SECRET, at_ingress)
    dialer.keep(address, who.incarnation)
    session = at_ingress.wait("open").session
    session.send(submit(num_tokens=3))
    answered = at_ingress.wait_tokens(3) == [1, 2, 3]
    dialer.stop()
    return answered


def refused(words: WordsThread, address: str, who: pb.Identity) -> str:
    """Why no session opens."""
    reasons = Recorder()
    told: list[str] = []

    def on_failed(_: str, error: Exception) -> None:
        told.append(str(error))
        reasons.on_overflow(None, None)  # type: ignore[arg-type]

    dialer = Dialer(words, identity("ingress-0", kind=pb.INGRESS), SECRET, Recorder(), on_failed=on_failed)
    dialer.keep(address, who.incarnation)
    reasons.wait("overflow")
    assert dialer.sessions() == []
    dialer.stop()
    return told[0]


def test_both_sides_show_certificates(authority: Authority, worker: tuple[str, pb.Identity, Echo]) -> None:
    address, who, _ = worker
    with thread(authority.settings("ingress")) as words:
        assert talks(words, address, who)


def test_whoever_cannot_show_one_stays_outside(
    authority: Authority, worker: tuple[str, pb.Identity, Echo], tmp_path: Path
) -> None:
    """In clear text; signed by nobody we know; run out. Then the worker serves the next one that is right."""
    address, who, handler = worker
    before = handler.count("open")
    stranger = Authority(tmp_path, "theirs").settings("stranger", ca_file=str(authority.ca_file))
    for tls in (None, stranger, authority.settings("late", days=-1)):
        with thread(tls) as words:
            assert "the stream to" in refused(words, address, who)
    ca = authority.ca_file.read_bytes()
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:  # knows us, shows nothing
        call = channel.stream_stream("/sluice.v1.Worker/Session", None, None)(iter([b"hello"]), timeout=DEADLINE_S)
        with pytest.raises(grpc.RpcError):
            next(iter(call))
    with raw_stream(address) as stream:
        stream.write(b"\x00" * 100)
        assert stream.end()[0] is grpc.StatusCode.UNAVAILABLE
    assert handler.count("open") == before
    with thread(authority.settings("right")) as words:
        assert talks(words, address, who)


def test_a_dialer_refuses_a_worker_that_is_not_who_it_should_be(authority: Authority, tmp_path: Path) -> None:
    """Signed by another authority, or for another name; and in clear text, where TLS is asked for."""
    who = identity()
    impostors = [
        Authority(tmp_path, "theirs").settings("impostor", ca_file=str(authority.ca_file)),
        authority.settings("elsewhere", "10.1.2.3"),
        None,
    ]
    for tls in impostors:
        handler = Echo()
        with thread(tls) as words:
            address = WordsServer(words, who, SECRET, handler).start()
            with thread(authority.settings("dialer")) as dialing:
                assert "the stream to" in refused(dialing, address, who)
            assert handler.events == []


def test_one_name_may_stand_in_all_certificates(authority: Authority) -> None:
    who = identity()
    with thread(authority.settings("named", "sluice.internal")) as words:
        address = WordsServer(words, who, SECRET, Echo()).start()
        with thread(authority.settings("dialer", "sluice.internal", server_name="sluice.internal")) as dialing:
            assert talks(dialing, address, who)


def test_a_certificate_is_no_secret(authority: Authority, worker: tuple[str, pb.Identity, Echo]) -> None:
    """TLS comes beside the cluster secret."""
    address, who, _ = worker
    told = Recorder()
    with thread(authority.settings("ingress")) as words:

        def on_failed(_: str, error: Exception) -> None:
            told.on_bulk(None, str(error), b"")  # type: ignore[arg-type]

        dialer = Dialer(words, identity(), b"another secret", Recorder(), on_failed=on_failed)
        dialer.keep(address, who.incarnation)
        assert "did not prove" in told.wait("bulk").topic
        dialer.stop()


def test_new_files_count_from_the_next_start_on(authority: Authority) -> None:
    """A worker that was restarted with a new certificate, and a dialer that was not, understand each other."""
    with thread(authority.settings("ingress")) as dialing:
        shown: list[bytes] = []
        for _ in range(2):
            settings, who = authority.settings("rotated"), identity()
            shown.append(Path(str(settings["cert_file"])).read_bytes())
            with thread(settings) as words:
                assert talks(dialing, WordsServer(words, who, SECRET, Echo()).start(), who)
        assert shown[0] != shown[1]


def test_files_that_do_not_fit_are_named(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.settings("one"), authority.settings("other")
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    wrong = [
        ({**one, "key_file": other["key_file"]}, "words.tls.key_file", "no private key"),
        ({**one, "key_file": str(bad)}, "words.tls.key_file", "no private key"),
        ({**one, "ca_file": str(bad)}, "words.tls.ca_file", "no certificates in PEM"),
        ({**one, "cert_file": str(tmp_path / "nothing")}, "words.tls.cert_file", "put it there"),
    ]
    for settings, path, told in wrong:
        with pytest.raises(ConfigError, match=told) as refused:
            WordsThread(config=words_config(tls=TlsConfig.model_validate(settings)))
        assert refused.value.path == path
