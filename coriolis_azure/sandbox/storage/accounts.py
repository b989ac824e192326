"""Storage accounts as ARM resources: endpoint, keys and firewall. `blobs` has their contents."""

from __future__ import annotations

import base64
import copy
import re
import secrets
import uuid
from datetime import datetime, timezone

from coriolis_azure import vhd
from coriolis_azure.sandbox.relations import STORAGE, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.store import Account, Blob
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, World, checked_tags, deleted, no_content, now, paged, placed


class Inside:
    """The contents of the storage accounts, for tests to read and change, bypassing all rules."""

    def __init__(self, world: World) -> None:
        self._world = world

    def account(self, name: str) -> Account:
        """The contents of an account."""
        return self._world.blobs.accounts.setdefault(name, Account())

    def resource(self, name: str) -> Resource:
        """The account as a resource."""
        account = named(self._world, name)
        if account is None:
            raise KeyError(name)
        return account

    def blob(self, path: str) -> Blob | None:
        """The blob at account/container/name."""
        account, container, name = path.split("/", 2)
        found_container = self.account(account).containers.get(container)
        return found_container.find(name) if found_container else None

    def content(self, blob: Blob) -> bytes:
        """All bytes of a blob."""
        with self._world.blobs.lock:
            return self._world.blobs.read(blob, 0, blob.size)

    def overwrite(self, blob: Blob, offset: int, data: bytes) -> None:
        """Change a blob as a stranger would."""
        with self._world.blobs.lock:
            self._world.blobs.write(blob, offset, data)
            self._world.blobs.changed(blob)

    def clear(self, blob: Blob, start: int, end: int) -> None:
        """Clear pages of a blob as a stranger would."""
        with self._world.blobs.lock:
            self._world.blobs.clear(blob, start, end)
            self._world.blobs.changed(blob)

    def grow(self, blob: Blob, size: int) -> None:
        """Make a VHD larger, as a stranger would: the footer moves to its new end."""
        with self._world.blobs.lock:
            store, end = self._world.blobs, blob.size - vhd.FOOTER
            store.clear(blob, end, blob.size)
            store.resize(blob, size + vhd.FOOTER)
            store.write(blob, size, vhd.footer(size, uuid.uuid4(), datetime.now(timezone.utc)))
            store.changed(blob)

    def page_ranges(self, most: int) -> None:
        """Set the most page ranges in one answer."""
        self._world.page_ranges = most

    def refuse_snapshot_imports(self) -> None:
        """From now on no disk can be imported from a snapshot of a blob."""
        self._world.imports_snapshots = False

    def end_leases(self) -> None:
        """Expire all leases except infinite ones."""
        with self._world.blobs.lock:
            for account in self._world.blobs.accounts.values():
                for container in account.containers.values():
                    for blob in container.blobs.values():
                        if blob.lease is not None and blob.lease.until is not None:
                            blob.lease.until = 0.0


_NAME = re.compile(r"[a-z0-9]{3,24}")
# First segments of paths that cannot be accounts.
_RESERVED = {"common", "metadata", "organizations", "sandbox", "subscriptions"}
_KINDS = ("StorageV2", "Storage", "BlobStorage", "BlockBlobStorage")
_SETTABLE = (
    "allowSharedKeyAccess",
    "allowBlobPublicAccess",
    "publicNetworkAccess",
    "networkAcls",
    "minimumTlsVersion",
)


def put(world: World, call: Call) -> Response:
    """Create or change an account: 200, without an operation."""
    account_id = world.canonical_id(call, STORAGE)
    existing = world.state.find(account_id)
    location = placed(world, call, STORAGE, existing)
    name = call.part["name"]
    if not _NAME.fullmatch(name):
        raise ArmError(
            400,
            "AccountNameInvalid",
            f"{name} is not a valid storage account name. Storage account name must be between 3 and 24 characters "
            "in length and use numbers and lower-case letters only.",
        )
    other = named(world, name)
    if name in _RESERVED or (other is not None and other is not existing):
        raise ArmError(
            409, "StorageAccountAlreadyTaken", f"The storage account named {name} is already taken."
        )
    if existing is None:
        existing = new_account(world, account_id, location, str(call.body.get("kind") or "StorageV2"))
    requested = call.body.get("properties") or {}
    existing.properties.update({key: copy.deepcopy(requested[key]) for key in _SETTABLE if key in requested})
    if "tags" in call.body:
        existing.document["tags"] = checked_tags(call.body)
    return Response.of(200, view(world, existing))


def new_account(world: World, account_id: str, location: str, kind: str = "StorageV2") -> Resource:
    """Add a storage account."""
    if kind not in _KINDS:
        raise ArmError(400, "InvalidValue", f"The value '{kind}' of parameter kind is none of {_KINDS}.")
    document: Json = {
        "id": account_id,
        "name": account_id.rpartition("/")[2],
        "type": STORAGE,
        "location": location,
        "tags": {},
        "sku": {"name": "Standard_LRS", "tier": "Standard"},
        "kind": kind,
        "properties": {
            "allowSharedKeyAccess": True,
            "publicNetworkAccess": "Enabled",
            "networkAcls": {"bypass": "AzureServices", "defaultAction": "Allow", "ipRules": []},
            "supportsHttpsTrafficOnly": True,
            "primaryLocation": location,
            "statusOfPrimary": "available",
            "creationTime": now(),
            "provisioningState": "Succeeded",
        },
    }
    hidden = {"keys": [_key(), _key()], "delegation": _key()}
    return world.state.add(Resource(document, hidden))


def delete(world: World, call: Call) -> Response:
    """Delete an account with its contents: 200, or 204 if there is none."""
    account = deleted(world, call, STORAGE)
    if account is None:
        return no_content()
    removed(world, account)
    world.state.remove(account)
    return Response(200)


def removed(world: World, account: Resource) -> None:
    """Delete the contents of an account."""
    with world.blobs.lock:
        removed_account = world.blobs.accounts.pop(account.name, None)
        for container in removed_account.containers.values() if removed_account else ():
            for blob in container.all():
                world.blobs.release(blob)
        world.blobs.save()


def list_keys(world: World, call: Call) -> Response:
    """POST listKeys: the account's keys."""
    account = world.existing(call, STORAGE)
    rows = [
        {"keyName": f"key{number}", "value": value, "permissions": "FULL"}
        for number, value in enumerate(account.hidden["keys"], 1)
    ]
    return Response.of(200, {"keys": rows})


def list_containers(world: World, call: Call) -> Response:
    """The containers, in ARM's list format."""
    account = world.existing(call, STORAGE)
    with world.blobs.lock:
        containers = world.blobs.accounts.get(account.name, Account()).containers
        rows = [
            {
                "id": f"{account.id}/blobServices/default/containers/{name}",
                "name": name,
                "type": f"{STORAGE}/blobServices/containers",
                "properties": {"publicAccess": "None", "leaseState": "Available"},
            }
            for name in sorted(containers)
        ]
    return paged(world, call, rows)


def view(world: World, account: Resource) -> Json:
    """The account with its endpoint."""
    document = copy.deepcopy(account.document)
    document["properties"]["primaryEndpoints"] = {"blob": endpoint(world, account)}
    return document


def endpoint(world: World, account: Resource) -> str:
    """The URL of an account's blob endpoint."""
    return f"{world.base}/{account.name}/"


def named(world: World, name: str) -> Resource | None:
    """The account with this name, which is globally unique."""
    # Called without the sandbox's lock: `list` copies the values atomically.
    for resource in list(world.state.resources.values()):
        if resource.type == STORAGE and same(resource.name, name):
            return resource
    return None


def _key() -> str:
    return base64.b64encode(secrets.token_bytes(64)).decode()


HANDLERS = {STORAGE: {"PUT": put, "PATCH": put, "DELETE": delete}}
VIEWS = {STORAGE.lower(): view}
