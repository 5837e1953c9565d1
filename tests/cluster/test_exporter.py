"""A process's metrics over real HTTP, and which processes have some."""

from __future__ import annotations

import socket
import threading
from contextlib import closing

import psutil
import pytest

from cluster.config import Role
from cluster.errors import ConfigError
from cluster.exporter import Exporter, exports_of
from cluster.membership import Member, Membership, MemberState
from cluster.metrics import Metrics, PullOutcome
from cluster.words_config import WordsConfig
from tests.support.scrape import scrape


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_listening_ports() -> set[int]:
    """Of this process alone: others on this machine take what is free of the same range."""
    connections = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


def test_each_process_is_scraped_at_the_address_it_announces() -> None:
    metrics = Metrics(), Metrics()
    exporters = [Exporter(each, WordsConfig()) for each in metrics]
    addresses = [exporter.start() for exporter in exporters]
    try:
        metrics[0].pulls.labels(PullOutcome.LATE).inc(3)
        metrics[1].pulls.labels(PullOutcome.LATE).inc(5)
        assert [scrape(a).total("sluice_transfer_pulls_total", outcome="late") for a in addresses] == [3, 5]
        assert {address.rpartition(":")[0] for address in addresses} == {"127.0.0.1"}
        ports = {int(address.rpartition(":")[2]) for address in addresses}
        assert len(ports) == 2 and ports <= own_listening_ports() and ports <= set(range(20000, 21000))
    finally:
        for exporter in exporters:
            exporter.stop()
    assert not ports & own_listening_ports()


def test_without_a_free_port_the_error_names_the_range() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"words\.port_min: no free port.* {port} to {port} on 127.0.0.1; widen"):
            Exporter(Metrics(), WordsConfig(port_min=port, port_max=port)).start()


def test_a_host_that_is_not_ours_is_an_error_of_its_own() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=r"words\.host: cannot listen on '192\.0\.2\.1'"):
        Exporter(Metrics(), WordsConfig(host="192.0.2.1", port_min=port, port_max=port)).start()


def test_a_scrape_never_sees_half_of_what_was_set_together() -> None:
    metrics = Metrics()
    metrics.set_blocks("self", {"free": 100, "ready": 0})
    stopping = threading.Event()

    def move() -> None:
        while not stopping.is_set():
            for ready in (100, 0, 37):
                metrics.set_blocks("self", {"free": 100 - ready, "ready": ready})

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(300):
            families = {family.name: family for family in metrics.registry.collect()}
            assert sum(sample.value for sample in families["sluice_kv_blocks"].samples) == 100
    finally:
        stopping.set()
        mover.join()


def test_members_that_are_gone_or_not_yet_there_export_nothing() -> None:
    def member(name: str, state: MemberState, metrics_address: str) -> Member:
        return Member(
            name=name, pool="mixed", incarnation=f"{name}-x", address="h:1", metrics_address=metrics_address,
            roles=(Role.PREFILL, Role.DECODE), state=state,
        )  # fmt: skip

    members = (
        member("mixed-3", MemberState.DRAINING, "h:20003"),
        member("mixed-0", MemberState.STARTING, ""),
        member("mixed-1", MemberState.READY, "h:20001"),
        member("mixed-2", MemberState.GONE, "h:20002"),
    )
    exports = exports_of(Membership(1, members))
    assert [(export.name, export.incarnation, export.address) for export in exports] == [
        ("mixed-1", "mixed-1-x", "h:20001"),
        ("mixed-3", "mixed-3-x", "h:20003"),
    ]
    assert {export.roles for export in exports} == {("prefill", "decode")}
