"""begin- and endGetAccess: the SAS with which a disk or snapshot is read over HTTPS, and its rules.

Azure names a snapshot of a family as a snapshot of one blob, anything else as a blob, and puts neither the end nor the
permissions into the URL: a stored policy has them, which `si` names. Texts of refusals that were not recorded from
Azure are the sandbox's own. A SAS lives by the client's time, at whatever pace the sandbox runs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from urllib.parse import quote

from coriolis_azure.sandbox.relations import DISK_POINTS, DISKS, SNAPSHOTS, machine_of_disk, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import Json, Response, bad_request, invalid, not_allowed
from coriolis_azure.sandbox.world import Call, Polling, World

LONGEST_SECONDS = 5_184_000
_OF_A_FAMILY = 5
_OF_A_DISK_ACCESS = 5
BLOB = "abcd"
_DIGITS = "abcdefghijklmnopqrstuvwxyz0123456789"


def begin(world: World, exported: Resource, call: Call) -> Response:
    """Grant access, or prolong it: 202; the operation's result has the SAS."""
    world.unlocked(exported.id, "write")
    seconds = _asked_seconds(exported, call.body)
    _check_exportable(world, exported)
    policy = (active(world, exported) or {}).get("policy") or _new_policy(exported)
    until = world.clock.now() + timedelta(seconds=seconds)
    exported.hidden["access"] = {"policy": policy, "until": until.isoformat()}
    headers = world.begin(
        call, "disk", location(exported), "access-granted", exported.id, Polling(result=True)
    )
    return Response(202, headers)


def end(world: World, exported: Resource, call: Call) -> Response:
    """Revoke access: 202. The SAS is dead at once."""
    world.unlocked(exported.id, "write")
    exported.hidden.pop("access", None)
    return Response(202, world.begin(call, "disk", location(exported), "access-revoked", exported.id))


def active(world: World, exported: Resource) -> Json | None:
    """The access that is granted to a disk or snapshot at present."""
    access: Json | None = exported.hidden.get("access")
    if access is None or datetime.fromisoformat(access["until"]) <= world.clock.now():
        return None
    return access


def granted(world: World, exported: Resource) -> Json:
    """The result of a grant; without a SAS if that was revoked in the meantime."""
    return {"accessSAS": url(world, exported)} if "access" in exported.hidden else {}


def url(world: World, exported: Resource) -> str:
    """The SAS of what has access granted."""
    host, container, snapshot = place(exported)
    signature = quote(_signature(world, exported), safe="")
    version, kind = ("2018-11-09", "bs") if snapshot else ("2018-03-28", "b")
    moment = f"snapshot={quote(snapshot)}&" if snapshot else ""
    policy = exported.hidden["access"]["policy"]
    return (
        f"{world.base}/{host}/{container}/{BLOB}?{moment}sv={version}&sr={kind}&si={policy}&sig={signature}"
    )


def signed(world: World, exported: Resource, query: dict[str, str]) -> bool:
    """Whether a URL's query is that of the present access to a disk or snapshot."""
    access = active(world, exported)
    return (
        access is not None
        and query.get("si") == access["policy"]
        and query.get("sr") == ("bs" if place(exported)[2] else "b")
        and hmac.compare_digest(query.get("sig", ""), _signature(world, exported))
    )


def place(exported: Resource) -> tuple[str, str, str]:
    """Where a disk or snapshot is read: host, container and, for a snapshot of a family, the blob's snapshot."""
    family = family_of(exported)
    seed = hashlib.sha256(str(family or exported.properties["uniqueId"]).encode()).digest()
    letters = "".join(_DIGITS[byte % len(_DIGITS)] for byte in seed)
    moment = datetime.fromisoformat(exported.properties["timeCreated"])
    snapshot = f"{moment:%Y-%m-%dT%H:%M:%S.%f}0Z" if family else ""
    return f"md-{letters[:12]}", letters[12:24], snapshot


def family_of(exported: Resource) -> str:
    """The id of the family of an incremental snapshot or a disk of a restore point; "" for anything else."""
    properties = exported.properties
    return str(properties.get("incrementalSnapshotFamilyId") or properties.get("familyId") or "")


def location(exported: Resource) -> str:
    """Where it is; the documents of restore points do not say."""
    return str(exported.hidden.get("location") or exported.location)


def exportable(world: World) -> Iterator[Resource]:
    """Everything that access can be granted to."""
    for kind in (SNAPSHOTS, DISKS, DISK_POINTS):
        yield from world.state.of_type(kind)


def not_exported(world: World, exported: Resource, act: str = "deleting the disk") -> None:
    """Refuse an act while access is granted."""
    if active(world, exported):
        raise not_allowed(
            f"There is an active shared access signature outstanding for disk {exported.name}. Call EndGetAccess "
            f"before {act}."
        )


def _asked_seconds(exported: Resource, body: Json) -> int:
    level, seconds = body.get("access"), body.get("durationInSeconds")
    if level not in {"Read", "Write"}:
        raise invalid("Required parameter 'access' is missing (null) or invalid.", "access")
    if level == "Write":
        raise bad_request(
            f"Access of level Write cannot be granted to {exported.name}: it was not made for upload."
        )
    if body.get("getSecureVMGuestStateSAS") or body.get("fileFormat", "VHD") != "VHD":
        raise bad_request("The sandbox does not imitate SAS of guest states and of VHDX files.")
    if not isinstance(seconds, int) or not 1 <= seconds <= LONGEST_SECONDS:
        raise invalid(
            f"The value '{seconds}' of parameter 'durationInSeconds' is out of range. The value must be between 1 "
            f"and {LONGEST_SECONDS}, inclusive.",
            "durationInSeconds",
        )
    return seconds


def _check_exportable(world: World, exported: Resource) -> None:
    """Refuse to grant access, or to prolong it."""
    policy = exported.properties.get("networkAccessPolicy", "AllowAll")
    if policy == "DenyAll":
        raise not_allowed(f"The NetworkAccessPolicy DenyAll of {exported.name} does not allow its export.")
    if exported.properties.get("completionPercent", 100.0) < 100.0:
        raise not_allowed(
            f"The snapshot {exported.name} is still being copied: its completionPercent is not 100."
        )
    owner = machine_of_disk(world.state, exported.id)
    if owner is not None and owner.hidden["power"] != "deallocated":
        raise not_allowed(f"Disk {exported.name} is attached to running VM {owner.id}.")
    others = [other for other in exportable(world) if other is not exported and active(world, other)]
    family, gate = family_of(exported), exported.properties.get("diskAccessId")
    if family and sum(family_of(other) == family for other in others) >= _OF_A_FAMILY:
        raise not_allowed(
            f"{_OF_A_FAMILY} snapshots of the family {family} have an active shared access signature already."
        )
    if (
        gate
        and sum(same(other.properties.get("diskAccessId"), gate) for other in others) >= _OF_A_DISK_ACCESS
    ):
        raise not_allowed(f"{_OF_A_DISK_ACCESS} disks or snapshots of {gate} are being exported already.")


def _new_policy(exported: Resource) -> str:
    """The name of a stored policy, in the two forms that Azure has."""
    return secrets.token_hex(32) if family_of(exported) else str(uuid.uuid4())


def _signature(world: World, exported: Resource) -> str:
    moment, policy = exported.properties["timeCreated"], exported.hidden["access"]["policy"]
    text = "\n".join([*place(exported), exported.id.lower(), moment, policy])
    digest = hmac.new(world.state.identity.signing_key.encode(), text.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def _action(
    kind: str, handler: Callable[[World, Resource, Call], Response]
) -> Callable[[World, Call], Response]:
    return lambda world, call: handler(world, world.existing(call, kind), call)


def _nothing(world: World, target: str) -> None:
    del world, target


ACTIONS = {
    f"{kind}/{{name}}/{verb}": _action(kind, handler)
    for kind in (DISKS, SNAPSHOTS)
    for verb, handler in (("beginGetAccess", begin), ("endGetAccess", end))
}
EFFECTS = {"access-granted": _nothing, "access-revoked": _nothing}
