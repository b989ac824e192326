"""The permissions that the identity needs: one table with every action of every step.

The custom role, the permission checks of `checks` and docs/reference/permissions.md are all built from it. Azure also
checks actions on the resources that a request refers to (linked actions); `why` says so if the name alone does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .. import settings
from ..model import Json
from ..settings import Environment

# Features chosen by the settings or the caller. An action without a feature is always needed.
WORKER = "worker"
EXPORT = "export of snapshots"
RESTORE_POINTS = "restore points"
PUBLIC_IP = "public IP"
OWN_NETWORK = "own network"
GIVEN_NETWORK = "existing network"
SHUTDOWN = "shutdown"
POOL = "worker pool"
VOLUMES = "records of volumes"
CUSTOMER_KEYS = "customer-managed keys"
WORKER_KEY = "a disk encryption set for the worker"
BLOB_STORAGE = "Blob storage"
BLOB_DATA = "Blob storage without its key"
ACCOUNT_KEY = "storage account key"
FEATURES = (
    WORKER,
    EXPORT,
    RESTORE_POINTS,
    PUBLIC_IP,
    OWN_NETWORK,
    GIVEN_NETWORK,
    SHUTDOWN,
    POOL,
    VOLUMES,
    CUSTOMER_KEYS,
    WORKER_KEY,
    BLOB_STORAGE,
    BLOB_DATA,
    ACCOUNT_KEY,
)

# Where an action must be allowed.
SUBSCRIPTION, GROUP, NETWORK, ACCOUNT = "subscription", "resource group", "network", "storage account"
ENCRYPTION_SET, SUBNET, CONTAINER = "disk encryption set", "subnet", "container"
# Scopes that depend on the VM: known once a VM is named.
VM, DISK, DISK_KEYS = "VM", "disk", "disk encryption set of the disks"
OF_THE_VM = frozenset({VM, DISK, DISK_KEYS})


@dataclass(frozen=True)
class Action:
    """An Azure action, the step that needs it, and the scope at which it must be allowed.

    The action is needed only if its `feature` is chosen. Without an `optional` action the work still gets done.
    `data` marks a data action of a role.
    """

    step: str
    name: str
    why: str
    scope: str = GROUP
    feature: str = ""
    optional: bool = False
    data: bool = False


def _of(
    step: str,
    why: str,
    *names: str,
    scope: str = GROUP,
    feature: str = "",
    optional: bool = False,
    data: bool = False,
) -> tuple[Action, ...]:
    return tuple(Action(step, f"Microsoft.{name}", why, scope, feature, optional, data) for name in names)


_CONTAINERS = "Storage/storageAccounts/blobServices/containers"
_POINTS = "Compute/restorePointCollections"
_IMAGE = "Compute/locations/publishers/artifacttypes/offers/skus/versions/read"
ACTIONS: tuple[Action, ...] = (
    *_of("connect", "find the resource group", "Resources/subscriptions/resourceGroups/read"),
    *_of(
        "inspect",
        "read the VM and its disks, the worker and the copies",
        *("Compute/virtualMachines/read", "Compute/disks/read"),
    ),
    *_of("inspect", "read the VM's state", "Compute/virtualMachines/instanceView/read", scope=VM),
    *_of(
        "inspect",
        "read its NICs and addresses",
        *("Network/networkInterfaces/read", "Network/publicIPAddresses/read"),
    ),
    *_of("inspect", "read the capabilities of VM sizes", "Compute/skus/read", scope=SUBSCRIPTION),
    *_of(
        "inspect",
        "recognize VM sizes that are no longer sold",
        "Compute/locations/vmSizes/read",
        scope=SUBSCRIPTION,
        optional=True,
    ),
    *_of(
        "shut down",
        "deallocate the VM",
        "Compute/virtualMachines/deallocate/action",
        scope=VM,
        feature=SHUTDOWN,
    ),
    *_of(
        "snapshot",
        "create and delete snapshots",
        *("Compute/snapshots/read", "Compute/snapshots/write", "Compute/snapshots/delete"),
    ),
    *_of(
        "snapshot",
        "linked: a snapshot's source is this disk",
        "Compute/disks/beginGetAccess/action",
        scope=DISK,
    ),
    *_of(
        "read",
        "read snapshots through a URL that Azure signs, and end that",
        *("Compute/snapshots/beginGetAccess/action", "Compute/snapshots/endGetAccess/action"),
        feature=EXPORT,
    ),
    *_of(
        "snapshot",
        "create and delete restore points of the VM",
        *(f"{_POINTS}/read", f"{_POINTS}/write", f"{_POINTS}/delete"),
        *(
            f"{_POINTS}/restorePoints/read",
            f"{_POINTS}/restorePoints/write",
            f"{_POINTS}/restorePoints/delete",
        ),
        f"{_POINTS}/restorePoints/diskRestorePoints/read",
        feature=RESTORE_POINTS,
    ),
    *_of(
        "read",
        "read or copy the disks of restore points, and end that",
        f"{_POINTS}/restorePoints/diskRestorePoints/beginGetAccess/action",
        f"{_POINTS}/restorePoints/diskRestorePoints/endGetAccess/action",
        feature=RESTORE_POINTS,
    ),
    *_of(
        "clone",
        "create and delete copies of disks",
        *("Compute/disks/write", "Compute/disks/delete"),
        feature=WORKER,
    ),
    *_of(
        "clone",
        "linked: a copy's source is this snapshot",
        "Compute/snapshots/beginGetAccess/action",
        feature=WORKER,
    ),
    *_of(
        "clone",
        "linked: copies use the disk encryption set of their source",
        "Compute/diskEncryptionSets/read",
        scope=DISK_KEYS,
        feature=CUSTOMER_KEYS,
    ),
    *_of(
        "worker",
        "create the worker, attach disks, delete it",
        *("Compute/virtualMachines/write", "Compute/virtualMachines/delete"),
        feature=WORKER,
    ),
    *_of(
        "worker",
        "stop and start it if it has rebooted with clones attached",
        *("Compute/virtualMachines/powerOff/action", "Compute/virtualMachines/start/action"),
        feature=WORKER,
        optional=True,
    ),
    *_of(
        "worker",
        "linked: the worker's own disk uses the disk encryption set of the settings",
        "Compute/diskEncryptionSets/read",
        scope=ENCRYPTION_SET,
        feature=WORKER_KEY,
    ),
    *_of(
        "worker",
        "stop an idle worker and start it again",
        *("Compute/virtualMachines/deallocate/action", "Compute/virtualMachines/start/action"),
        feature=POOL,
    ),
    *_of("worker", "find a current image", _IMAGE, scope=SUBSCRIPTION, feature=WORKER),
    *_of(
        "worker",
        "its NIC; linked: the worker uses it",
        *("Network/networkInterfaces/write", "Network/networkInterfaces/delete"),
        "Network/networkInterfaces/join/action",
        feature=WORKER,
    ),
    *_of(
        "worker",
        "its firewall; linked: the NIC uses it",
        *("Network/networkSecurityGroups/write", "Network/networkSecurityGroups/delete"),
        "Network/networkSecurityGroups/join/action",
        feature=WORKER,
    ),
    *_of(
        "worker",
        "its public address; linked: the NIC uses it",
        *("Network/publicIPAddresses/write", "Network/publicIPAddresses/delete"),
        "Network/publicIPAddresses/join/action",
        feature=PUBLIC_IP,
    ),
    *_of(
        "worker",
        "a network for the run; linked: the NIC is in its subnet",
        *("Network/virtualNetworks/write", "Network/virtualNetworks/delete"),
        "Network/virtualNetworks/subnets/join/action",
        feature=OWN_NETWORK,
    ),
    *_of(
        "worker",
        "read the network of the settings",
        "Network/virtualNetworks/read",
        scope=NETWORK,
        feature=GIVEN_NETWORK,
    ),
    *_of(
        "worker",
        "linked: the worker's NIC is in the subnet of the settings",
        "Network/virtualNetworks/subnets/join/action",
        scope=SUBNET,
        feature=GIVEN_NETWORK,
    ),
    *_of(
        "copy",
        "say which state a volume of the orchestrator holds, and which run may write to it",
        *("Network/networkSecurityGroups/write", "Network/networkSecurityGroups/delete"),
        feature=VOLUMES,
    ),
    *_of(
        "storage",
        "find the storage account",
        "Storage/storageAccounts/read",
        feature=BLOB_STORAGE,
    ),
    *_of(
        "storage",
        "find or create the container",
        *(f"{_CONTAINERS}/read", f"{_CONTAINERS}/write"),
        scope=CONTAINER,
        feature=BLOB_DATA,
    ),
    *_of(
        "storage",
        "read, write and delete blobs",
        *(f"{_CONTAINERS}/blobs/read", f"{_CONTAINERS}/blobs/write", f"{_CONTAINERS}/blobs/delete"),
        scope=CONTAINER,
        feature=BLOB_DATA,
        data=True,
    ),
    *_of(
        "storage",
        "sign a URL for a VHD that Azure copies from another account",
        "Storage/storageAccounts/blobServices/generateUserDelegationKey/action",
        scope=ACCOUNT,
        feature=BLOB_DATA,
        optional=True,
    ),
    *_of(
        "storage",
        "delete the blob versions that an account keeps",
        f"{_CONTAINERS}/blobs/deleteBlobVersion/action",
        scope=CONTAINER,
        feature=BLOB_DATA,
        optional=True,
        data=True,
    ),
    *_of(
        "storage",
        "use the key of the storage account",
        "Storage/storageAccounts/listKeys/action",
        feature=ACCOUNT_KEY,
    ),
    *_of(
        "wait",
        "follow an operation to its end",
        *("Compute/locations/operations/read", "Compute/locations/diskOperations/read"),
        *("Network/locations/operations/read", "Network/locations/operationResults/read"),
    ),
    *_of(
        "clean up",
        "find what earlier runs have left",
        *("Network/networkSecurityGroups/read", "Network/virtualNetworks/read"),
    ),
    *_of(
        "check",
        "check these permissions, and locks, before anything is created",
        *("Authorization/permissions/read", "Authorization/locks/read"),
        optional=True,
    ),
    *_of(
        "check",
        "check what Azure Policy would deny before anything is created",
        "PolicyInsights/checkPolicyRestrictions/read",
        optional=True,
    ),
    *_of(
        "check",
        "check the subscription's state, quota and API versions before anything is created",
        *("Resources/subscriptions/read", "Resources/subscriptions/providers/read"),
        *("Compute/locations/usages/read", "Network/locations/usages/read"),
        scope=SUBSCRIPTION,
        optional=True,
    ),
)


def features(environment: Environment) -> set[str]:
    """The features that the settings choose. The caller adds SHUTDOWN, POOL and VOLUMES, the disks CUSTOMER_KEYS."""
    chosen = _of_mechanism(environment)
    if environment.consistency != settings.DISK:
        chosen.add(RESTORE_POINTS)
    if environment.storage_account_name:
        chosen.add(BLOB_STORAGE)
    if environment.storage_use_account_key:
        chosen |= {BLOB_STORAGE, ACCOUNT_KEY}
    elif environment.storage_account_name:
        chosen.add(BLOB_DATA)
    return chosen


def _of_mechanism(environment: Environment) -> set[str]:
    """The features that the way to read disks needs."""
    mechanism = environment.replica_export_mechanism
    chosen = set() if mechanism == settings.WORKER else {EXPORT}
    if mechanism == settings.SNAPSHOTS:
        return chosen
    chosen |= {WORKER, GIVEN_NETWORK if environment.export_network else OWN_NETWORK}
    if environment.export_worker_disk_encryption_set:
        chosen.add(WORKER_KEY)
    if environment.export_worker_use_fip:
        chosen.add(PUBLIC_IP)
    return chosen


def needed(chosen: Collection[str]) -> list[Action]:
    """The actions needed for these features, in the order of the steps."""
    return [action for action in ACTIONS if not action.feature or action.feature in chosen]


def role(chosen: Collection[str], scopes: Sequence[str], name: str = "coriolis-azure source") -> Json:
    """The least-privilege custom role for these features, in the format of `az role definition create`."""
    return {
        "Name": name,
        "IsCustom": True,
        "Description": "Takes virtual machines out of Azure. With: "
        + (", ".join(feature for feature in FEATURES if feature in chosen) or "nothing optional")
        + ".",
        "Actions": _named(action for action in needed(chosen) if not action.data),
        "NotActions": [],
        "DataActions": _named(action for action in needed(chosen) if action.data),
        "NotDataActions": [],
        "AssignableScopes": list(scopes),
    }


def _named(actions: Iterable[Action]) -> list[str]:
    return sorted({action.name for action in actions}, key=str.lower)


def granted(permissions: Iterable[Json], action: Action) -> bool:
    """Whether Azure's list of permissions allows `action`.

    Each entry belongs to one role: an action that its notActions exclude may still be allowed by another role.
    """
    allowed, excluded = ("dataActions", "notDataActions") if action.data else ("actions", "notActions")
    return any(
        _matches(entry.get(allowed), action.name) and not _matches(entry.get(excluded), action.name)
        for entry in permissions
    )


def _matches(patterns: Iterable[str] | None, action: str) -> bool:
    """Whether a pattern matches the action, ignoring case; * matches anything, slashes included."""
    return any(
        re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), action, re.IGNORECASE)
        for pattern in patterns or ()
    )
