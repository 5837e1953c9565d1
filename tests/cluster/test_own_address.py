"""Where a process is found that listens on all addresses of its machine."""

from __future__ import annotations

import socket

import psutil
import pytest

from cluster.exporter import Exporter
from cluster.metrics import Metrics
from cluster.own_address import announced
from cluster.rpc import WordsServer
from cluster.words_thread import WordsThread
from tests.support.scrape import scrape
from tests.support.words import SECRET, Recorder, identity, words_config


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "fe80::1", "worker-0.sluice"])
def test_an_address_of_its_own_is_announced_as_it_is(host: str) -> None:
    assert announced(host) == host


@pytest.mark.parametrize(("host", "family"), [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)])
def test_all_addresses_are_announced_as_one_of_them(host: str, family: socket.AddressFamily) -> None:
    own = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == family}
    loopback = {"127.0.0.1", "::1"}
    address = announced(host)
    assert address in own | loopback
    elsewhere = {each for each in own - loopback if "%" not in each}
    assert (address in loopback) <= (not elsewhere)


def test_words_and_metrics_are_found_where_they_are_announced() -> None:
    config = words_config().model_copy(update={"host": "0.0.0.0"})
    with WordsThread(config=config) as words:
        server = WordsServer(words, identity("worker-0"), SECRET, Recorder())
        address = server.start()
        host, _, port = address.rpartition(":")
        assert host == announced("0.0.0.0")
        with socket.create_connection((host, int(port))):
            server.stop()
    exporter = Exporter(Metrics(), config)
    address = exporter.start()
    try:
        assert address.startswith(f"{host}:")
        assert scrape(address).total("sluice_transfer_pulls_total") == 0
    finally:
        exporter.stop()
