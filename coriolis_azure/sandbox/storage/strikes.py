"""What fault rules do to exported disks, beside spoiling answers."""

from __future__ import annotations

from collections.abc import Callable

from coriolis_azure.sandbox.compute import exports
from coriolis_azure.sandbox.faults import Fault
from coriolis_azure.sandbox.storage.exported import located
from coriolis_azure.sandbox.wire import Request
from coriolis_azure.sandbox.world import World


def _expire(world: World, request: Request, fault: Fault) -> None:
    """End the life of the SAS in a request."""
    del fault
    exported = located(world, request.path, request.query)
    if exported is not None:
        exported.hidden.pop("access", None)


def _merge(world: World, request: Request, fault: Fault) -> None:
    """Refuse to serve the other members of the family of a snapshot that is deleted, for some seconds."""
    snapshot = world.state.find(request.path)
    if snapshot is not None:
        until = world.clock.monotonic() + fault.seconds
        world.exporting.merging[exports.place(snapshot)[0]] = (until, fault.status, fault.code)


def _rewrite_policy(world: World, request: Request, fault: Fault) -> None:
    """Change the network policy of a snapshot that was made just now, as Azure Policy does."""
    snapshot = world.state.find(request.path)
    if snapshot is not None:
        snapshot.properties["networkAccessPolicy"] = fault.code


STRIKES: dict[str, Callable[[World, Request, Fault], None]] = {
    "sas-expired": _expire,
    "family-merging": _merge,
    "network-policy": _rewrite_policy,
}
