"""Storage accounts as ARM resources: their endpoint, keys and firewall; what is in them is `blobs`' business."""

from __future__ import annotations

import base64
import copy
import re
import secrets

from coriolis_azure.sandbox.relations import STORAGE, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.store import Account, Blob
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, World, checked_tags, deleted, no_content, now, paged, placed


class Inside:
    """What is in the storage accounts, past all rules: for tests to look at and to change."""

    def __init__(self, world: World) -> None:
        self._world = world

    def account(self, name: str) -> Account:
        """What is in an account."""
        return self._world.blobs.accounts.setdefault(name, Account())

    def resource(self, name: str) -> Resource:
        """The account as a resource."""
        found = named(self._world, name)
        if found is None:
            raise KeyError(name)
        return found

    def blob(self, path: str) -> Blob | None:
        """The blob at account/container/name."""
        account, container, name = path.split("/", 2)
        place = self.account(account).containers.get(container)
        return place.find(name) if place else None

    def content(self, blob: Blob) -> bytes:
        """All bytes of a blob."""
        with self._world.blobs.lock:
            return self._world.blobs.read(blob, 0, blob.size)

    def overwrite(self, blob: Blob, offset: int, data: bytes) -> None:
        """What a stranger does to a blob."""
        with self._world.blobs.lock:
            self._world.blobs.write(blob, offset, data)
            self._world.blobs.changed(blob)

    def page_ranges(self, most: int) -> None:
        """The most page ranges that one answer lists from now on."""
        self._world.page_ranges = most

    def imports_snapshots(self, can: bool) -> None:
        """Whether a disk can be imported from a snapshot of a blob from now on."""
        self._world.imports_snapshots = can

    def end_leases(self) -> None:
        """Let all leases but the endless ones run out."""
        with self._world.blobs.lock:
            for account in self._world.blobs.accounts.values():
                for container in account.containers.values():
                    for blob in container.blobs.values():
                        if blob.lease is not None and blob.lease.until is not None:
                            blob.lease.until = 0.0


_NAME = re.compile(r"[a-z0-9]{3,24}")
# First words of paths that are not accounts'.
_TAKEN = {"common", "metadata", "organizations", "sandbox", "subscriptions"}
_KINDS = ("StorageV2", "Storage", "BlobStorage", "BlockBlobStorage")
_KEPT = (
    "allowSharedKeyAccess",
    "allowBlobPublicAccess",
    "publicNetworkAccess",
    "networkAcls",
    "minimumTlsVersion",
)


def put(world: World, call: Call) -> Response:
    """Create or change an account: 200, and it is there."""
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
    stranger = named(world, name)
    if name in _TAKEN or (stranger is not None and stranger is not existing):
        raise ArmError(
            409, "StorageAccountAlreadyTaken", f"The storage account named {name} is already taken."
        )
    if existing is None:
        existing = new_account(world, account_id, location, str(call.body.get("kind") or "StorageV2"))
    given = call.body.get("properties") or {}
    existing.properties.update({key: copy.deepcopy(given[key]) for key in _KEPT if key in given})
    if "tags" in call.body:
        existing.document["tags"] = checked_tags(call.body)
    return Response.of(200, view(world, existing))


def new_account(world: World, account_id: str, location: str, kind: str = "StorageV2") -> Resource:
    """An account that exists."""
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
    """Delete an account and all in it: 200, or 204 when there is none."""
    account = deleted(world, call, STORAGE)
    if account is None:
        return no_content()
    removed(world, account)
    world.state.remove(account)
    return Response(200)


def removed(world: World, account: Resource) -> None:
    """Forget what is in an account."""
    with world.blobs.lock:
        gone = world.blobs.accounts.pop(account.name, None)
        for container in gone.containers.values() if gone else ():
            for blob in container.all():
                world.blobs.release(blob)
        world.blobs.save()


def list_keys(world: World, call: Call) -> Response:
    """POST listKeys."""
    account = world.existing(call, STORAGE)
    rows = [
        {"keyName": f"key{number}", "value": value, "permissions": "FULL"}
        for number, value in enumerate(account.hidden["keys"], 1)
    ]
    return Response.of(200, {"keys": rows})


def list_containers(world: World, call: Call) -> Response:
    """The containers as ARM lists them."""
    account = world.existing(call, STORAGE)
    with world.blobs.lock:
        held = world.blobs.accounts.get(account.name, Account()).containers
        rows = [
            {
                "id": f"{account.id}/blobServices/default/containers/{name}",
                "name": name,
                "type": f"{STORAGE}/blobServices/containers",
                "properties": {"publicAccess": "None", "leaseState": "Available"},
            }
            for name in sorted(held)
        ]
    return paged(world, call, rows)


def view(world: World, account: Resource) -> Json:
    """The account with where it is reached."""
    document = copy.deepcopy(account.document)
    document["properties"]["primaryEndpoints"] = {"blob": endpoint(world, account)}
    return document


def endpoint(world: World, account: Resource) -> str:
    """The URL of an account's blob endpoint."""
    return f"{world.base}/{account.name}/"


def named(world: World, name: str) -> Resource | None:
    """The account of that name, which is one of the whole world's."""
    # Without the sandbox's lock: `list` takes all of them at one moment.
    for each in list(world.state.resources.values()):
        if each.type == STORAGE and same(each.name, name):
            return each
    return None


def _key() -> str:
    return base64.b64encode(secrets.token_bytes(64)).decode()


HANDLERS = {STORAGE: {"PUT": put, "PATCH": put, "DELETE": delete}}
VIEWS = {STORAGE.lower(): view}
