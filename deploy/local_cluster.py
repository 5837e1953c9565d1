"""A Ray cluster of our own for local mode: started, used and taken down by one process.

Its files lie in a short directory of its own under /tmp, its ports in a window of its own. Ray's services listen
on 127.0.0.1 only (where Ray is not imported before the start) and want a token; HAProxy's statistics and the
replicas' own gRPC, for which Serve knows no address, listen everywhere. It takes no notice of RAY_ADDRESS and of
other Ray clusters on the machine, and leaves them alone. After `stop` nothing that it started is left: no process,
no file.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster.errors import SluiceError
from cluster.streams import is_free

OBJECT_STORE_BYTES = 80 << 20  # close to Ray's least; only Serve's small messages go through it

_LOCAL = "127.0.0.1"
_MARK = "SLUICE_LOCAL_CLUSTER"  # in the environment of all that belongs to one cluster: its directory
_WINDOWS = range(21_100, 31_900, 100)  # below the ports that the kernel hands out, above those of words
_GONE_S = 10.0  # for processes to end by themselves
_STARTS = 3  # Ray gives its first node 30 s, a constant of its own, which a busy machine may need longer than
_TOO_SLOW = ("timed out during startup", "Timed out waiting for file")  # in the plain exceptions that it raises then


class PortWindow:
    """100 neighbouring ports, held against other clusters of ours on this machine until `close`.

    0 fallback proxy (HTTP), 1 its gRPC, 2 HAProxy metrics, 3 HAProxy statistics, 4 public, 5 dashboard,
    10–54 replicas' HTTP, 55–99 replicas' gRPC.
    """

    def __init__(self) -> None:
        bases = list(_WINDOWS)
        offset = secrets.randbelow(len(bases))
        for base in bases[offset:] + bases[:offset]:
            holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # An abstract address: exclusive, and gone with the process however that ends.
                holder.bind(f"\0sluice-ports-{base}")
            except OSError:
                holder.close()
                continue
            if all(is_free(_LOCAL, port) for port in range(base, base + 20)):
                self._holder, self.base = holder, base
                return
            holder.close()
        raise SluiceError(
            f"no 100 neighbouring free ports from {_WINDOWS.start} to {_WINDOWS.stop}; stop other sluice clusters"
        )

    def close(self) -> None:
        self._holder.close()


def environment(directory: Path, base: int, secret_env: str) -> dict[str, str]:
    """What Ray, Serve and HAProxy read, and the cluster secret. Serve's options are constants of its modules."""
    haproxy = directory / "ha"
    return {
        _MARK: str(directory),
        secret_env: secrets.token_hex(32),
        "UCX_NET_DEVICES": "lo",  # what does not go through shared memory
        "RAY_USAGE_STATS_ENABLED": "0",
        # One token per process: Ray's library keeps the first that it sees. Left alone, Ray turns tokens on.
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_TMPDIR": str(directory),
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",  # where /dev/shm is small, Ray uses a file
        "RAY_DEDUP_LOGS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a cluster of one machine: on the loopback interface
        # A dead node is noticed in 4 s instead of 15.
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 s are too few for a busy machine
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(base),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(base + 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(base + 2),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(base + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(base + 10),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(base + 54),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(base + 55),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(base + 99),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # A killed replica is left out at its first failed connection, or after two missed checks.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "2",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # A replica that we stop has drained already; and the old HAProxy of a reload follows soon.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "330",
        "RAY_SERVE_PORT_QUARANTINE_S": "5",
    }


class LocalCluster:
    """One Ray cluster, its head in this process. Not thread-safe; at most one per process at a time."""

    def __init__(self, directory: Path, ports: PortWindow) -> None:
        self.directory = directory
        self.ports = ports
        self._serving = False

    @classmethod
    def start(cls, num_cpus: int, secret_env: str, *, show_logs: bool = False, dashboard: bool = False) -> LocalCluster:
        """Blocks some seconds. `num_cpus` is a scheduling figure. Raises SluiceError with the remedy."""
        ports = PortWindow()
        directory = Path(tempfile.mkdtemp(prefix="sluice-", dir="/tmp"))  # short: sockets lie in it
        (directory / "ha").mkdir()
        cluster = cls(directory, ports)
        try:
            with _environment(environment(directory, ports.base, secret_env)):
                cluster._start_ray(num_cpus, show_logs, dashboard)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _start_ray(self, num_cpus: int, show_logs: bool, dashboard: bool) -> None:
        import ray.serve  # noqa: F401  (reads its constants from the environment of this moment)

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for start in range(1, _STARTS + 1):
            try:
                self._init_ray(num_cpus, show_logs, dashboard)
                break
            except Exception as error:  # Ray's own kinds, and the plain one
                if start == _STARTS or not any(text in str(error) for text in _TOO_SLOW):
                    raise SluiceError(
                        f"Ray did not start: {error}; look for full disks (/tmp, /dev/shm), little free memory and "
                        "other work on this machine, and try `python -m deploy doctor`"
                    ) from error
                self._end_stragglers(grace_s=0)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray has put its own there, which abort the process

    def _init_ray(self, num_cpus: int, show_logs: bool, dashboard: bool) -> None:
        import ray

        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            dashboard_port=self.dashboard_port,
            object_store_memory=OBJECT_STORE_BYTES,
            namespace="sluice",
            log_to_driver=show_logs,
            logging_level=logging.WARNING if show_logs else logging.ERROR,
            _temp_dir=str(self.directory),
            _node_ip_address=_LOCAL,
        )

    @property
    def dashboard_port(self) -> int:
        """Where `serve deploy` is answered, if the cluster was started with a dashboard."""
        return self.ports.base + 5

    def start_serve(self, host: str, port: int) -> int:
        """Starts Serve's front; returns the port, which is one of the window for 0."""
        from ray import serve

        port = port or self.ports.base + 4
        if not is_free(host, port):
            raise SluiceError(f"port {port} on {host} is taken; name another with --port, or 0 for a free one")
        serve.start(http_options={"host": host, "port": port})
        self._serving = True
        return port

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to this cluster and runs now, this process apart."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid():
            return False
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.environ().get(_MARK) == str(self.directory):
                return True
            words = process.cmdline()
            if words and words[0].startswith("ray::"):
                # A process that gives itself a title writes it over its arguments and environment.
                return any(file.path.startswith(str(self.directory)) for file in process.open_files())
            return any(str(self.directory) in word for word in words)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def stop(self) -> None:
        """Takes everything down; idempotent. Apps should have drained before."""
        import ray

        if ray.is_initialized():
            if self._serving:
                from ray import serve

                serve.shutdown()
                self._serving = False
            ray.shutdown()
        self._end_stragglers()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.ports.close()

    def _end_stragglers(self, grace_s: float = _GONE_S) -> None:
        """Ray's processes end after their raylet; what does not is ours to end."""
        _, left = psutil.wait_procs(self.processes(), timeout=grace_s)
        for process in [*left, *self.processes()]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=_GONE_S)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets `variables` for the processes started inside, and restores what was, the token for Ray apart."""
    foreign = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # of another cluster
    before = {name: os.environ.get(name) for name in [*variables, *foreign] if name != "RAY_AUTH_TOKEN"}
    for name in foreign:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
