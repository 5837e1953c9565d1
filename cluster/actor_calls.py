"""Calls to the actors of workers, and their end."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray import PlacementGroupID
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] (compiled)
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.membership import Member, Membership
from cluster.worker_spec import ActorName

NAMESPACE = "sluice"
_ANSWER_S = 5.0


class LeavingNodes:
    """What `ray drain-node` has been told, as Serve reads it. Made in a process that Ray knows."""

    def __init__(self) -> None:
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)

    def places(self) -> frozenset[str]:
        """Names of the placement groups with a bundle on a node that is to go. Blocks: called in a thread. Raises
        RayError."""
        leaving = set(self._gcs.get_draining_nodes(timeout=_ANSWER_S))
        if not leaving:
            return frozenset()
        return frozenset(
            entry["name"]
            for entry in placement_group_table().values()
            if not leaving.isdisjoint(entry["bundles_to_node_id"].values())
        )


async def call(method: Any, *args: object) -> Any:
    return await method.remote(*args)


async def call_within(timeout_s: float, method: Any, *args: object) -> Any:
    async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may lose a cancellation
        return await method.remote(*args)


def only_member(wire: bytes) -> Member:
    (member,) = Membership.from_wire(wire).members
    return member


def remove_worker(actor_name: ActorName) -> None:
    """Kills the actor and frees its place, each if it is there. Blocks: called in a thread."""
    try:
        ray.kill(ray.get_actor(str(actor_name), NAMESPACE), no_restart=True)
    except (RayError, ValueError):  # gone already
        pass
    for id_hex, entry in placement_group_table().items():  # names are found in the job's namespace only
        if entry["name"] == str(actor_name) and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(id_hex)))


def reason_of(error: BaseException) -> str:
    """One line: the cause's own words where a call failed in the other process."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, BaseException) else error
    lines = str(shown).strip().splitlines() or [""]
    return f"{type(shown).__name__}: {lines[0]}" if lines[0] else type(shown).__name__
