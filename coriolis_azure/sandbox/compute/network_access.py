"""How a disk or snapshot may be exported: its network policy, and the disk access that guards it."""

from __future__ import annotations

from coriolis_azure.sandbox.relations import DISK_ACCESSES
from coriolis_azure.sandbox.wire import ArmError, Json, invalid
from coriolis_azure.sandbox.world import World

_POLICIES = ("AllowAll", "AllowPrivate", "DenyAll")


def check(world: World, requested: Json, present: Json) -> None:
    """Refuse a request whose policy and disk access, with what is `present`, contradict each other."""
    policy, gate = (
        requested.get(name, present.get(name)) for name in ("networkAccessPolicy", "diskAccessId")
    )
    if policy not in {None, *_POLICIES}:
        raise invalid(
            f"The value '{policy}' of parameter networkAccessPolicy is invalid.", "networkAccessPolicy"
        )
    if gate and policy != "AllowPrivate":
        raise ArmError(
            409,
            "ConflictingUserInput",
            "Disk Access is only supported for disks with NetworkAccessPolicy AllowPrivate",
        )
    if policy == "AllowPrivate" and not gate:
        raise invalid("Required parameter 'diskAccessId' is missing (null).", "diskAccessId")
    found = world.state.find(gate) if gate else None
    if gate and (found is None or found.type != DISK_ACCESSES):
        raise ArmError(404, "NotFound", f"Resource {gate.rpartition('/')[2]} is not found.")
