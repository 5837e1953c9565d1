"""What a fuzzer must leave behind: the processes that were there before, idle, and no larger than they may be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx
import psutil

from tests.support.ray_cluster import until
from tests.support.scrape import Scrape, targets

_IDLE_S = 60.0
_MAX_NEW_FILES = 64  # the proxy keeps connections to replicas
_EMPTY = (
    "sluice_ingress_open_requests",
    "sluice_engine_waiting_sequences",
    "sluice_engine_running_sequences",
    "sluice_engine_pulling_sequences",
    "sluice_kv_leases",
    "sluice_kv_leased_blocks",
)
_UNCHANGED = ("sluice_cluster_restarts_total", "sluice_words_broken_sessions_total", "sluice_words_sessions")
_HELD = ("filling", "ready", "quarantined")


@dataclass(frozen=True)
class Census:
    """Of one app at one time, by the name of the process."""

    incarnations: dict[str, str]
    pids: dict[str, int]
    rss_bytes: dict[str, int]
    num_files: dict[str, int]
    """Open ones, sockets too."""
    unchanged: dict[str, dict[str, float]]

    @classmethod
    def take(cls, url: str, num_processes: int) -> Census:
        """When all are named and idle; says what does not end otherwise."""
        scrapes: dict[str, Scrape] = {}
        incarnations: dict[str, str] = {}
        addresses: dict[str, str] = {}
        busy: list[str] = ["nobody was asked"]

        def is_idle() -> bool:
            try:
                found = targets(url)
                scrapes.clear()
                scrapes.update({target.name: target.scrape() for target in found})
            except (httpx.HTTPError, AssertionError) as error:
                busy[:] = [repr(error)]
                return False
            incarnations.update({target.name: target.incarnation for target in found})
            addresses.update({target.name: target.address for target in found})
            busy[:] = [f"{name}: {what}" for name, scrape in scrapes.items() for what in _held_by(scrape)]
            if len(scrapes) != num_processes:
                busy.append(f"{sorted(scrapes)} are named, {num_processes} expected")
            return not busy

        try:
            asyncio.run(until(is_idle, "the app is idle", _IDLE_S))
        except AssertionError:
            raise AssertionError(f"still not idle after {_IDLE_S:g} s: {busy}") from None
        pids = _listeners(addresses)
        processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        return cls(
            incarnations=incarnations,
            pids=pids,
            rss_bytes={name: process.memory_info().rss for name, process in processes.items()},
            num_files={name: process.num_fds() for name, process in processes.items()},
            unchanged={name: {each: scrape.total(each) for each in _UNCHANGED} for name, scrape in scrapes.items()},
        )

    def check(self, before: Census, max_growth_bytes: int) -> None:
        """Nobody was replaced, no session was lost or is left, nobody grew by more."""
        assert self.incarnations == before.incarnations, (before.incarnations, self.incarnations)
        assert self.pids == before.pids, (before.pids, self.pids)
        assert self.unchanged == before.unchanged, (before.unchanged, self.unchanged)
        grown = {name: rss - before.rss_bytes[name] for name, rss in self.rss_bytes.items()}
        assert max(grown.values()) <= max_growth_bytes, grown
        opened = {name: number - before.num_files[name] for name, number in self.num_files.items()}
        assert max(opened.values()) <= _MAX_NEW_FILES, opened


def _held_by(scrape: Scrape) -> list[str]:
    found = {name: scrape.total(name) for name in _EMPTY}
    found |= {f"{state} blocks": scrape.total("sluice_kv_blocks", state=state) for state in _HELD}
    return [f"{what} = {value:g}" for what, value in found.items() if value]


def _listeners(addresses: dict[str, str]) -> dict[str, int]:
    """By name, who listens at an address."""
    by_port: dict[int, int] = {}
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.pid:
            host_and_port: tuple[str, int] = tuple(each.laddr)  # pyright: ignore[reportAssignmentType]
            by_port[host_and_port[1]] = each.pid
    return {name: by_port[int(address.rpartition(":")[2])] for name, address in addresses.items()}
