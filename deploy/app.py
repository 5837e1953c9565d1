"""`deploy.app:build`: the one way from a config to a Serve application.

Our CLI, `serve run`, `serve deploy` and RayService's serveConfigV2 all go through it. It starts nothing: the first
ingress replica makes the controller, which makes the workers.

    import_path: deploy.app:build
    args:
      config: path of a YAML file, as seen where the application is built
      config_inline: or its content
      overrides: ["pools.decode.workers=2", …]

`serve build` takes no arguments and wants the application itself: `serve build deploy.app:app` builds from
./sluice.yaml.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve

from cluster.config import SluiceConfig
from cluster.config_file import load
from cluster.errors import ConfigError
from deploy import serve_headers
from deploy.ingress import Ingress

NUM_CPUS = 0.1  # of a replica: a scheduling figure
_REPLICA_ENV = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": serve_headers.IMPORT_PATH,
    # Nothing of ours blocks a loop: what is sent goes from the app to the socket without another thread between.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


class AppArgs(BaseModel):
    """What a Serve config file may say under `args`."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    config_inline: dict[str, object] | None = None
    overrides: list[str] = []

    def read(self) -> SluiceConfig:
        """Raises ConfigError."""
        if self.config is not None and self.config_inline is not None:
            raise ConfigError("args", "both config and config_inline are given; remove one")
        return load(self.config, self.overrides, self.config_inline)


def build(args: Mapping[str, object]) -> serve.Application:
    """Raises ConfigError. The revision is drawn here: a later build wins, a restarted replica keeps its own."""
    try:
        config = AppArgs.model_validate(args).read()
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(["args", *map(str, first["loc"])])
        raise ConfigError(path, f"{first['msg']}; there are {', '.join(AppArgs.model_fields)}") from None
    return bind(config, revision=time.time_ns())


def __getattr__(name: str) -> serve.Application:
    if name == "app":
        return build({"config": "sluice.yaml"})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def bind(config: SluiceConfig, revision: int) -> serve.Application:
    http = config.http
    deployment = serve.deployment(
        name="Ingress",
        num_replicas=http.replicas,
        max_ongoing_requests=http.max_ongoing_requests,
        graceful_shutdown_timeout_s=http.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=10,
        max_surge_percent=100,  # a successor is there before its predecessor stops
        ray_actor_options={"num_cpus": NUM_CPUS, "runtime_env": {"env_vars": _REPLICA_ENV}},
    )(Ingress)
    return deployment.bind(config.model_dump_json(), revision)
