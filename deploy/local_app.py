"""Local mode: our own Ray cluster with the whole app in it, from nothing to ready and back to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from cluster.config import SluiceConfig
from cluster.errors import SluiceError
from cluster.membership import Membership, MemberState
from cluster.placement import at_most, place, total
from deploy.local_cluster import LocalCluster
from deploy.served_model import ServedModel

Progress = Callable[[str], None]

_LOOK_S = 0.1
_ATTEMPTS = 3  # starts of one worker that may fail for whatever reason before we give up


class LocalApp:
    """`url` is set when the app is ready. Driven by one thread; `stop` may follow an exception at any place."""

    def __init__(self, config: SluiceConfig, progress: Progress, *, show_logs: bool = False) -> None:
        """`show_logs`: what the workers write comes to this process's output; log.level=debug does that, too."""
        self.config = config
        self._show_logs = show_logs or config.log.level == "debug"
        self.url = ""
        self._on_progress = progress
        self._told = ""
        self._cluster: LocalCluster | None = None
        self._deployed = False

    def start(self) -> str:
        """Returns the URL once the first request would succeed. Raises SluiceError with the remedy."""
        config = self.config
        ServedModel.read(config)  # what fails at once should fail before Ray starts
        self._progress("starting Ray")
        room = total(place(at_most(config.pools) if config.autoscaling.enabled else config.pools))
        num_cpus = int(2 * room.cpus) + config.http.replicas + 2  # a redeploy may need twice the room
        self._cluster = LocalCluster.start(num_cpus, config.words.secret_env, show_logs=self._show_logs)
        self._progress("starting the front door")
        port = self._cluster.start_serve(config.http.host, config.http.port)
        self.url = f"http://{config.http.host}:{port}"
        self._deploy(config)
        self._wait_until_ready()
        return self.url

    def _progress(self, text: str) -> None:
        """What has been said is not said again: a log is no place for a spinner."""
        if text != self._told:
            self._told = text
            self._on_progress(text)

    def redeploy(self, config: SluiceConfig) -> None:
        """Brings the running app to `config` (not its port); returns when the new replicas serve."""
        self.config = config
        self._deploy(config)

    def _deploy(self, config: SluiceConfig) -> None:
        from ray import serve

        from deploy.app import build

        self._deployed = True
        try:
            serve.run(build({"config_inline": config.model_dump(mode="json")}), name=config.name, route_prefix="/")
        except RuntimeError as error:
            raise SluiceError(f"the ingress did not start: {_reason(config.name) or error}") from error

    def _wait_until_ready(self) -> None:
        """Every replica has answered: two rounds of healthy answers in a row, as many as there are replicas each."""
        wanted = 2 * self.config.http.replicas
        num_healthy = 0
        deadline = time.monotonic() + self.config.controller.start_timeout_s
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while num_healthy < wanted:
                reason = self._unhealthy(client)
                num_healthy = num_healthy + 1 if reason is None else 0
                if reason is None:
                    continue
                self._look_at_workers()
                if time.monotonic() > deadline:
                    raise SluiceError(
                        f"not ready after controller.start_timeout_s = {self.config.controller.start_timeout_s:g} s: "
                        f"{reason}; raise it, or set log.level=debug to see what the workers say"
                    )
                time.sleep(_LOOK_S)

    def _unhealthy(self, client: httpx.Client) -> str | None:
        try:
            answer = client.get(f"{self.url}/health", headers={"connection": "close"})
        except httpx.HTTPError as error:
            return f"/health does not answer ({type(error).__name__})"
        return None if answer.status_code == 200 else f"/health says {answer.status_code} {answer.text[:200]}"

    def _look_at_workers(self) -> None:
        from ray.exceptions import RayError

        from deploy.life import status

        try:
            now = status(self.config.name)
        except (RayError, ValueError):
            self._progress("waiting for the controller")
            return
        for failure in now.failures:
            if failure.lasting or failure.count >= _ATTEMPTS:
                raise SluiceError(f"{failure.worker} does not start: {failure.error}")
        members = Membership.from_wire(now.membership).members
        waiting = [member.name for member in members if member.state is MemberState.STARTING]
        self._progress(f"loading the model: {', '.join(waiting)}" if waiting else "connecting the workers")

    def stop(self) -> None:
        """Drains: the front first, so that open requests end, then the workers, then the cluster. Idempotent."""
        if self._cluster is None:
            return
        try:
            if self._deployed:
                self._drain()
        finally:
            self.kill()

    def kill(self) -> None:
        """Takes everything down without draining."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.stop()

    def _drain(self) -> None:
        from ray import serve
        from ray.exceptions import RayError

        from deploy.life import remove

        self._progress("draining: open requests end, new ones are refused")
        self._deployed = False
        try:
            serve.delete(self.config.name)
            self._progress("stopping the workers")
            remove(self.config.name, self.config.controller.drain_timeout_s)
        except (RayError, RuntimeError, TimeoutError, ValueError) as error:
            self._progress(f"not drained: {error}")


@contextmanager
def local_app(config: SluiceConfig, progress: Progress) -> Iterator[LocalApp]:
    """A ready app; drained and gone afterwards."""
    app = LocalApp(config, progress)
    try:
        app.start()
        yield app
    finally:
        app.stop()


def _reason(app: str) -> str:
    """What the replica raised, without the way there."""
    from ray import serve

    status = serve.status().applications.get(app)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    return " ".join(message.rstrip().rpartition("\n")[2] for message in messages)
