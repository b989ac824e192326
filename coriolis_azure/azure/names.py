"""Names, ids and tags. The same inputs give the same name in any process, so no names need to be stored.

Our resources are named `coriolis-<run>-<role>` and carry the tags below from the request that creates them. Only the
tags decide whether a resource is ours, never its name.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from ..clock import moment as moment  # also that of a tag
from ..errors import Unreadable

RUN_TAG = "coriolis-run"
ROLE_TAG = "coriolis-role"
INSTANCE_TAG = "coriolis-instance"
SEVERAL = "several VMs"  # the value on a worker that runs of several VMs share: no VM can have this name
MADE_TAG = "coriolis-made"
ALIVE_TAG = "coriolis-alive"
# On a worker's security group while a process deploys or deletes the run (without a worker, on its snapshots while it
# is deleted), and on the network that a pool shares while it is made. A process that deploys renews ALIVE_TAG often.
STEP_TAG = "coriolis-step"
DEPLOYING, DELETING = "deploying", "deleting"
# Resources that outlive runs on purpose: the workers of a pool, the records of volumes, and baselines. They carry one
# of these tags instead of RUN_TAG, so that no sweep deletes them as orphans.
POOL_TAG = "coriolis-pool"
VOLUME_TAG = "coriolis-volume"
BASELINE_TAG = "coriolis-baseline"
OURS = frozenset({RUN_TAG, POOL_TAG, VOLUME_TAG, BASELINE_TAG})
UNTIL_TAG = "coriolis-until"  # when a baseline may be deleted by anybody's clean-up
BY_TAG = "coriolis-by"  # on a baseline that is a snapshot of a blob, from its beginning: the run that took it
# On a baseline of a volume: how the orchestrator describes the volume, for when its state is lost.
DESTINATION_TAG = "coriolis-destination"
# The disk that a snapshot of a blob is of. The content of a volume's record: the disk it is a copy of, the
# state it holds, and the run that may write to it.
DISK_TAG = "coriolis-disk"
HOLDS_TAG = "coriolis-holds"
WRITER_TAG = "coriolis-writer"

# The kinds of resources we create, in the order in which they can be deleted: users before what they use.
TYPES = {
    "vm": "Microsoft.Compute/virtualMachines",
    "disk": "Microsoft.Compute/disks",
    "snapshot": "Microsoft.Compute/snapshots",
    "collection": "Microsoft.Compute/restorePointCollections",
    "nic": "Microsoft.Network/networkInterfaces",
    "ip": "Microsoft.Network/publicIPAddresses",
    "nsg": "Microsoft.Network/networkSecurityGroups",
    "vnet": "Microsoft.Network/virtualNetworks",
}
KINDS = {type_.lower(): kind for kind, type_ in TYPES.items()}


_ARM_ID = re.compile(
    r"/subscriptions/[^/]+/resourceGroups/[^/]+/providers/[^/]+(/[^/]+/[^/]+)+", re.IGNORECASE
)


class ArmId(str):
    """The complete ARM id of a resource in a resource group, or of a child of one. Made by `parsed`."""

    @classmethod
    def parsed(cls, text: str) -> ArmId | None:
        """`text` as an ARM id; None if it is anything else, such as a name."""
        return cls(text) if _ARM_ID.fullmatch(text) else None

    @property
    def subscription(self) -> str:
        """The id of the subscription, as it was written."""
        return self.split("/")[2]

    @property
    def type(self) -> str:
        """The type in lower case: microsoft.network/virtualnetworks/subnets."""
        namespace, *rest = self.lower().split("/")[6:]
        return "/".join([namespace, *rest[::2]])


class BlobsId(str):
    """Our id for what a run created from the blob at `url`: a copy or snapshots of it, which have no ARM id.

    Passed along with ARM ids, from which its type tells it.
    """

    @classmethod
    def of(cls, url: str, run: str) -> BlobsId:
        """The id for what `run` created from the blob at `url`."""
        return cls(f"{url}#{run}")

    @property
    def url(self) -> str:
        """The URL of the blob."""
        return self.partition("#")[0]

    @property
    def run(self) -> str:
        """The id of the run."""
        return self.partition("#")[2]


def new_run() -> str:
    """A new run id: short enough to read aloud, long enough not to collide with another."""
    return secrets.token_hex(4)


def resource(run: str, role: str) -> str:
    """The name of the resource with `role` in `run`: lower case, at most 64 characters."""
    return f"coriolis-{run}-{role}"


def run_of(name: str) -> str | None:
    """The run in a name that `resource` has given; None for any other name."""
    match = re.match(r"coriolis-([0-9a-z]+)-.", name, re.IGNORECASE)
    return match[1] if match else None


def is_of_a_run(name: str) -> bool:
    """Whether `name` has the form that `resource` gives to what a run, a pool or the record of a volume is made of."""
    return re.fullmatch(r"coriolis-[0-9a-f]{8}([0-9a-f]{4}){0,2}-.+", name, re.IGNORECASE) is not None


def resource_id(subscription: str, group: str, kind: str, name: str) -> str:
    """The ARM id of a resource whose kind is one of `TYPES`."""
    return f"/subscriptions/{subscription}/resourceGroups/{group}/providers/{TYPES[kind]}/{name}"


def name_of(id: str) -> str:
    """The last part of an ARM id."""
    return id.rpartition("/")[2]


def path_of(id: str) -> tuple[str, ...]:
    """The names in an ARM id: that of the resource and, in the id of a child, those of its parents before it."""
    return tuple(id.split("/")[8::2])


def is_disk_point(id: str) -> bool:
    """Whether this is the ARM id of a disk of a restore point."""
    return "/diskrestorepoints/" in id.lower()


def group_of(id: str) -> str:
    """The resource group in an ARM id, in the case that Azure used (which varies: compare in lower case)."""
    return _after(id, "resourcegroups")


def scope_of(id: str) -> str:
    """The part of an ARM id up to its resource group, in lower case."""
    return "/".join(id.lower().split("/")[:5])


def resource_of(id: str) -> str:
    """The id of the resource that a child id (of a subnet, of a NIC's IP configuration) belongs to."""
    return "/".join(id.split("/")[:9])


def kind_of(id: str) -> str:
    """The kind of an ARM id, one of `TYPES`. Raises Unreadable for any other type."""
    kind = KINDS.get(_type_in(id))
    if kind is None:
        raise Unreadable(f"{id!r} is not the ARM id of a resource type in use here")
    return kind


def is_vm(id: str) -> bool:
    """Whether an ARM id is that of a VM."""
    return KINDS.get(_type_in(id)) == "vm"


def is_of_our_kinds(id: str) -> bool:
    """Whether the type of an ARM id is one of `TYPES`."""
    return _type_in(id) in KINDS


def network_of(subnet_id: str) -> str:
    """A subnet as people write it: `vnet/subnet`."""
    return f"{_after(subnet_id, 'virtualnetworks')}/{_after(subnet_id, 'subnets')}"


def same(one: str, other: str) -> bool:
    """Whether two ARM ids, or parts of them, are equal ignoring case, which Azure changes between answers."""
    return one.lower() == other.lower()


def tags(run: str, role: str, instance: str, made: datetime, extra: Mapping[str, str]) -> dict[str, str]:
    """The tags that mark a resource as ours; `extra` are the user's own."""
    return {
        **extra,
        RUN_TAG: run,
        ROLE_TAG: role,
        INSTANCE_TAG: instance[:256],
        MADE_TAG: stamp(made),
    }


def tags_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a resource by lower-case name: tag names are case-insensitive, and policies rewrite their case."""
    return {name.lower(): value for name, value in (document.get("tags") or {}).items()}


def retagged(document: Mapping[str, Any], tags: Mapping[str, str], without: str = "") -> dict[str, str]:
    """The tags of a resource with these instead of those of the same name, in whatever case, and not `without`."""
    replaced = {*tags, without}
    others = (document.get("tags") or {}).items()
    return {**{name: value for name, value in others if name.lower() not in replaced}, **tags}


def stamp(moment: datetime) -> str:
    """A moment in the format of our tags."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _type_in(id: str) -> str:
    return "/".join(id.split("/")[6:8]).lower()


def _after(id: str, part: str) -> str:
    """The segment after `part` in an ARM id. Raises Unreadable if there is none."""
    segments = id.split("/")
    for before, name in pairwise(segments):
        if before.lower() == part and name:
            return name
    raise Unreadable(f"{id!r} is not a valid ARM id: nothing follows {part}")
