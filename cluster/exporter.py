"""One process's metrics over HTTP, and who exports them where: plain values that Prometheus is told."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from cluster.errors import ConfigError
from cluster.membership import Membership, MemberState
from cluster.metrics import Metrics
from cluster.own_address import announced
from cluster.streams import bracketed
from cluster.words_config import WordsConfig

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

METRICS_PATHS = ("/", "/metrics")


class Exporter:
    """GET /metrics of one process, on a thread of its own: a busy engine or event loop delays no scrape.

    It listens where the words plane does: on `words.host`, on the first free port of the same range. Who asks needs
    no secret, and learns counts and names only. `page` tells the JSON of any other path, on the same threads; None:
    there is no such page.
    """

    def __init__(
        self, metrics: Metrics, config: WordsConfig, page: Callable[[str], bytes | None] = lambda path: None
    ) -> None:
        self._metrics = metrics
        self._config = config
        self._page = page
        self._serving: tuple[WSGIServer, threading.Thread] | None = None

    def start(self) -> str:
        """The address to announce, host:port. Raises ConfigError when no port is free or the host is not ours."""
        config = self._config
        for port in range(config.port_min, config.port_max + 1):
            try:
                self._serving = start_http_server(port, config.host, self._metrics.registry)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise ConfigError("words.host", f"cannot listen on {config.host!r}: {error.strerror}") from error
            server, _ = self._serving
            server.set_app(_with_pages(server.get_app(), self._page))
            return f"{bracketed(announced(config.host))}:{port}"
        raise ConfigError(
            "words.port_min",
            f"no free port for metrics from {config.port_min} to {config.port_max} on {config.host}; "
            "widen words.port_min – words.port_max",
        )

    def stop(self) -> None:
        """Idempotent."""
        serving, self._serving = self._serving, None
        if serving is not None:
            server, thread = serving
            server.shutdown()
            server.server_close()
            thread.join()


def _with_pages(metrics: WSGIApplication | None, page: Callable[[str], bytes | None]) -> WSGIApplication:
    assert metrics is not None

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in METRICS_PATHS:
            return metrics(environ, start_response)
        told = page(path)
        status = "404 Not Found" if told is None else "200 OK"
        start_response(status, [("Content-Type", "application/json")])
        return [told or b"null"]

    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A process that exports metrics. `roles`: what a worker accepts; `ingress` or `controller` for the others."""

    name: str  # of a worker: stable over restarts
    incarnation: str
    address: str  # host:port
    roles: tuple[str, ...]


def exports_of(membership: Membership) -> tuple[Export, ...]:
    """The workers that are alive and have said where their metrics are, in order of their names."""
    return tuple(
        Export(
            name=member.name,
            incarnation=member.incarnation,
            address=member.metrics_address,
            roles=tuple(role.value for role in member.roles),
        )
        for member in sorted(membership.members, key=lambda member: (member.name, member.incarnation))
        if member.metrics_address and member.state is not MemberState.GONE
    )
