"""Questions to an app's controller from outside the app: the CLI, demo and tests. Blocking calls."""

from __future__ import annotations

from typing import Any

import ray

from cluster.actor_calls import NAMESPACE
from cluster.controller import Status, controller_name

_ANSWER_S = 10.0


def status(app: str) -> Status:
    """Raises ValueError if there is no controller, RayError if it does not answer."""
    return _get(_controller(app).status.remote(), _ANSWER_S)


def remove(app: str, drain_timeout_s: float) -> None:
    """Drains and removes all workers of the app and its controller. None is fine too."""
    try:
        controller = _controller(app)
    except ValueError:
        return
    _get(controller.remove.remote(), drain_timeout_s + 2 * _ANSWER_S)


def _controller(app: str) -> Any:
    return ray.get_actor(controller_name(app), NAMESPACE)


def _get(call: Any, timeout_s: float) -> Any:
    return ray.get(call, timeout=timeout_s)
