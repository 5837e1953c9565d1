"""One ingress replica: the OpenAI API over the router, tied to the controller. A Ray Serve deployment."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi import FastAPI
from ray import serve

from cluster.config import Role, SluiceConfig
from cluster.errors import ConfigError
from cluster.exporter import Export, Exporter, exports_of
from cluster.log import Log
from cluster.membership import Membership
from cluster.metrics import Metrics
from cluster.protos import worker_pb2 as pb
from cluster.words_thread import WordsThread
from deploy.api_keys import ENV, ApiKeys
from deploy.api_service import ApiService
from deploy.lifeline import Lifeline
from deploy.openai_api import create_app
from deploy.prometheus import add_targets
from deploy.quota import Quotas
from deploy.served_model import ServedModel
from deploy.status_page import add_status_page, pages_of
from deploy.tokenizer import Tokenizer
from router.router import Router
from workers.actor import WorkerActor

if TYPE_CHECKING:
    from deploy.traces import Traces

_WARM_S = 10.0


@serve.ingress()
class Ingress:
    """Everything is made on the replica; what travels there is the config (JSON) and its revision."""

    def __init__(self, config: str, revision: int) -> None:
        self._config = SluiceConfig.model_validate_json(config)
        self._revision = revision
        self._membership: Membership | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once, on the event loop that will serve the app."""
        config = self._config
        ingress_id = f"ingress-{uuid4().hex[:8]}"
        log = Log.open("ingress", config.log, worker=ingress_id)
        metrics = Metrics()
        model, tokenizer, api_keys = await asyncio.to_thread(_read_files, config)
        self._words = WordsThread(config=config.words).start()
        identity = pb.Identity(kind=pb.INGRESS, name=ingress_id, incarnation=uuid4().hex)
        self._router = Router(
            config.router,
            config.limits,
            self._words,
            identity,
            cluster_secret(config),
            metrics,
            log,
            block_size=config.kv.block_size,
        )
        self._quotas = Quotas(metrics)
        await self._router.start()
        pages = pages_of(self._router.route, self._router.last_routes)
        self._exporter = Exporter(metrics, config.words, pages)
        address = await asyncio.to_thread(self._exporter.start)
        self._export = Export(name=ingress_id, incarnation=identity.incarnation, address=address, roles=("ingress",))
        self._lifeline = Lifeline(config, self._revision, ingress_id, WorkerActor, self._follow, log, self._export)
        self._lifeline.start()
        self._traces = await asyncio.to_thread(_traces, config, model.name, ingress_id, log)
        await self._get_warm()
        app = create_app(
            ApiService(
                router=self._router,
                tokenizer=tokenizer,
                model=model,
                http=config.http,
                limits=config.limits,
                metrics=metrics,
                log=log,
                api_keys=api_keys,
                quotas=self._quotas,
                affinity_header=config.router.affinity_header,
                traces=self._traces,
            ),
            ids_are_echoed=True,
            replicas=self._other_replicas,
        )
        add_targets(app, config.name, model.name, self._exports)
        add_status_page(app, config, self._router, ingress_id, self._other_replicas)
        return app

    def _exports(self) -> list[Export]:
        """Of all living processes of the app, as far as this replica has heard."""
        others = [export for export in self._lifeline.exports if export.incarnation != self._export.incarnation]
        return [*exports_of(self._membership or Membership()), *others, self._export]

    def _other_replicas(self) -> list[str]:
        """Where they tell what they know of their requests."""
        return [each.address for each in self._exports() if each.roles == self._export.roles and each != self._export]

    async def _get_warm(self) -> None:
        """Where workers serve already, this replica takes requests once it has dialed them: a redeploy loses none."""
        deadline = time.monotonic() + _WARM_S
        while time.monotonic() < deadline and not self._router.ready():
            if self._membership is not None and not self._membership.ready(Role.DECODE):
                return
            await asyncio.sleep(0.02)

    def _follow(self, membership: Membership, num_ingresses: int) -> None:
        self._membership = membership
        self._router.set_replicas(num_ingresses)
        self._quotas.set_replicas(num_ingresses)
        self._router.update_membership(membership)

    async def __del__(self) -> None:
        """Called by Serve once, when the open requests have ended."""
        if hasattr(self, "_lifeline"):
            await self._lifeline.stop()
            await self._router.stop()
            await asyncio.to_thread(self._words.stop)
            await asyncio.to_thread(self._exporter.stop)
            if self._traces is not None:
                await asyncio.to_thread(self._traces.stop)


def _traces(config: SluiceConfig, model: str, ingress_id: str, log: Log) -> Traces | None:
    """None: they are off, and OpenTelemetry is not imported."""
    if config.traces.endpoint is None:
        return None
    from deploy.traces import Traces

    return Traces(config.traces, app=config.name, instance=ingress_id, model=model, log=log)


def cluster_secret(config: SluiceConfig) -> bytes:
    """From the environment. Raises ConfigError when it is empty."""
    secret = os.environ.get(config.words.secret_env, "")
    if not secret:
        raise ConfigError(
            "words.secret_env",
            f"environment variable {config.words.secret_env} is empty on this node; "
            "give every Ray node the same secret in it",
        )
    return secret.encode()


def _read_files(config: SluiceConfig) -> tuple[ServedModel, Tokenizer | None, ApiKeys | None]:
    return ServedModel.read(config), Tokenizer.load(config.model.path), _api_keys(config)


def _api_keys(config: SluiceConfig) -> ApiKeys | None:
    """Raises ConfigError."""
    file, variable = config.http.api_keys_file, config.http.api_keys_env
    if variable is None:
        return None if file is None else ApiKeys.read(file)
    return ApiKeys.parse(os.environ.get(variable, "").splitlines(), f"environment variable {variable}", ENV)
