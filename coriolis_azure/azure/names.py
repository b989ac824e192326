"""Names, ids and tags: the same inputs give the same name in any process, so nothing needs to be remembered.

A resource of ours is called `coriolis-<run>-<role>` and carries the tags below from the request that creates
it. Whether a resource is ours is decided by its tags alone, never by its name.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from ..errors import Unreadable

RUN_TAG = "coriolis-run"
ROLE_TAG = "coriolis-role"
INSTANCE_TAG = "coriolis-instance"
MADE_TAG = "coriolis-made"
ALIVE_TAG = "coriolis-alive"
# On a run's security group while one process deploys the run, and shows life often.
STEP_TAG = "coriolis-step"
DEPLOYING = "deploying"
# Resources that outlive runs on purpose: the workers of a pool, and the records of volumes. They carry one of these
# instead of RUN_TAG, so that no sweep takes them for leftovers.
POOL_TAG = "coriolis-pool"
VOLUME_TAG = "coriolis-volume"
OURS = frozenset({RUN_TAG, POOL_TAG, VOLUME_TAG})
# What a volume's record says: whose copy the volume is, which state it holds, and which run may write to it.
DISK_TAG = "coriolis-disk"
HOLDS_TAG = "coriolis-holds"
WRITER_TAG = "coriolis-writer"

# The kinds of resources we make, in the order in which they can be deleted: whatever uses another comes first.
TYPES = {
    "vm": "Microsoft.Compute/virtualMachines",
    "disk": "Microsoft.Compute/disks",
    "snapshot": "Microsoft.Compute/snapshots",
    "nic": "Microsoft.Network/networkInterfaces",
    "ip": "Microsoft.Network/publicIPAddresses",
    "nsg": "Microsoft.Network/networkSecurityGroups",
    "vnet": "Microsoft.Network/virtualNetworks",
}
KINDS = {type_.lower(): kind for kind, type_ in TYPES.items()}


def new_run() -> str:
    """A fresh run id: short enough to read aloud, long enough not to meet another."""
    return secrets.token_hex(4)


def resource(run: str, role: str) -> str:
    """The name of the resource that plays `role` in `run`; at most 64 characters, lower case."""
    return f"coriolis-{run}-{role}"


def is_of_a_run(name: str) -> bool:
    """Whether a resource is called as a run calls what it makes."""
    return re.fullmatch(r"coriolis-[0-9a-f]{8}-.+", name, re.IGNORECASE) is not None


def resource_id(subscription: str, group: str, kind: str, name: str) -> str:
    """The ARM id of a resource of one of `TYPES`."""
    return f"/subscriptions/{subscription}/resourceGroups/{group}/providers/{TYPES[kind]}/{name}"


def name_of(id: str) -> str:
    """The last part of an ARM id."""
    return id.rpartition("/")[2]


def group_of(id: str) -> str:
    """The resource group in an ARM id, in the case in which Azure wrote it (which varies: compare lower-cased)."""
    return _after(id, "resourcegroups")


def scope_of(id: str) -> str:
    """The subscription and the resource group in an ARM id, lower-cased."""
    return "/".join(id.lower().split("/")[:5])


def resource_of(id: str) -> str:
    """The resource that an ARM id of a part of it (a subnet, a NIC's configuration) belongs to."""
    return "/".join(id.split("/")[:9])


def kind_of(id: str) -> str:
    """Which of `TYPES` an ARM id is; Unreadable for any other type."""
    kind = KINDS.get(_type_in(id))
    if kind is None:
        raise Unreadable(f"{id!r} is no ARM id of a kind that is used here")
    return kind


def is_of_our_kinds(id: str) -> bool:
    """Whether an ARM id is of one of `TYPES`."""
    return _type_in(id) in KINDS


def blobs_of(url: str, run: str) -> str:
    """The id of what a run has made of the blob at `url`: a copy, or snapshots of it. ARM has none for these."""
    return f"{url}#{run}"


def url_and_run(id: str) -> tuple[str, str]:
    """What an id of `blobs_of` was made of."""
    url, _, run = id.partition("#")
    return url, run


def is_blob(id: str) -> bool:
    """Whether an id is one of `blobs_of`."""
    return id.startswith("https://")


def network_of(subnet_id: str) -> str:
    """`vnet/subnet`, the way people name a subnet."""
    return f"{_after(subnet_id, 'virtualnetworks')}/{_after(subnet_id, 'subnets')}"


def same(one: str, other: str) -> bool:
    """Whether two ARM ids mean one resource: Azure changes their case between answers."""
    return one.lower() == other.lower()


def tags(run: str, role: str, instance: str, made: datetime, extra: Mapping[str, str]) -> dict[str, str]:
    """The tags that make a resource ours; `extra` are the user's own."""
    return {
        **extra,
        RUN_TAG: run,
        ROLE_TAG: role,
        INSTANCE_TAG: instance[:256],
        MADE_TAG: stamp(made),
    }


def tags_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a resource by lower-cased name: names of tags have no case, and policies rewrite it."""
    return {name.lower(): value for name, value in (document.get("tags") or {}).items()}


def stamp(moment: datetime) -> str:
    """A moment as our tags write it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(stamp: str) -> datetime | None:
    """The moment that a tag names; None when somebody wrote something else into it."""
    try:
        found = datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else None


def _type_in(id: str) -> str:
    return "/".join(id.split("/")[6:8]).lower()


def _after(id: str, part: str) -> str:
    """What follows `part` in an ARM id; Unreadable where nothing does."""
    parts = id.split("/")
    for before, name in pairwise(parts):
        if before.lower() == part and name:
            return name
    raise Unreadable(f"{id!r} is no ARM id: it names nothing after {part}")
