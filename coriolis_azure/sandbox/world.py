"""All mutable state of the sandbox: resources, disk contents, guests and long-running operations.

The provider modules (`disks`, `machines`, `network`, `groups`) consist of functions of a `World` and a `Call`. They
register how a resource is shown (`VIEWS`) and how an operation ends (`EFFECTS`).

A request changes things at once, except where Azure does so late: a resource does not become Succeeded, and a deletion
or a detach is not done, before its operation ends. An operation ends at its last poll. If its client stops polling, it
ends with the first other request after `PATIENCE` seconds, or when the sandbox restarts.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, urlencode

from coriolis_azure.clock import Clock
from coriolis_azure.sandbox.budgets import Budgets
from coriolis_azure.sandbox.catalog import LOCATIONS
from coriolis_azure.sandbox.content import Contents
from coriolis_azure.sandbox.exporting import Exporting
from coriolis_azure.sandbox.guest.guests import Guests
from coriolis_azure.sandbox.relations import GROUPS, MACHINES, interface_entries, locks_over, same
from coriolis_azure.sandbox.state import Operation, Resource, State
from coriolis_azure.sandbox.storage.store import BlobStore
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response

# The base URL of a sandbox that is not served, for requests that never leave the process.
INSIDE = "https://sandbox.invalid"
PATIENCE = 0.25
# How long Azure reserves the NICs of a VM that it failed to make.
RESERVED_SECONDS = 180
# The time between two polls of an operation, as recorded from Azure; used if the sandbox runs at Azure's own pace.
_RETRY_AFTER = {"compute": "10", "disk": "2", "network": "10", "group": "15"}

View = Callable[["World", Resource], Json]
Effect = Callable[["World", str], None]


@dataclass(frozen=True)
class Call:
    """A parsed request; `part` has the variables of its path by name."""

    request: Request
    part: dict[str, str]
    subscription: str
    body: Json = field(default_factory=dict)

    @cached_property
    def query(self) -> dict[str, str]:
        """The query's parameters by lower-cased name."""
        return self.request.query

    @property
    def group_id(self) -> str:
        """The id of the resource group in the path."""
        return f"/subscriptions/{self.subscription}/resourceGroups/{self.part['group']}"

    def id_of(self, kind: str) -> str:
        """The id of the resource that the path names; `kind` is its type in the canonical spelling."""
        return f"{self.group_id}/providers/{kind}/{self.part['name']}"


@dataclass(frozen=True)
class Polling:
    """How a client polls an operation: the last answer follows `polls` others, at the URLs in `headers`.

    `result`: it has the resource.
    """

    polls: int = 0
    headers: tuple[str, ...] = ("Azure-AsyncOperation", "Location")
    result: bool = False


_USUAL = Polling()


class World:
    """See the module. Not thread-safe: the sandbox holds a lock during each request."""

    def __init__(
        self,
        directory: Path,
        views: dict[str, View],
        effects: dict[str, Effect],
        *,
        namespaces: bool,
        clock: Clock,
        pace: float,
    ) -> None:
        self.state = State(directory / "state.json")
        self.contents = Contents(directory / "disks")
        self.guests = Guests(directory / "guests", namespaces=namespaces)
        self.blobs = BlobStore(directory / "blobs")
        # The base URL of the sandbox.
        self.base = INSIDE
        self.page_size = 100
        self.api_profile = "latest"
        # Whether a disk can be imported from a snapshot of a blob.
        self.imports_snapshots = True
        # The most page ranges in one answer.
        self.page_ranges = 10_000
        # Overrides of the usage lists: (in use, limit) by name.
        self.quotas: dict[str, tuple[int, int]] = {}
        # Tags that a policy requires of every new resource.
        self.required_tags: list[str] = []
        # The identity's roles, in the form of the permissions list.
        self.permissions: list[Json] = [
            {"actions": ["*"], "notActions": [], "dataActions": ["*"], "notDataActions": []}
        ]
        self.clock = clock
        self.budgets = Budgets(self.seconds, pace)
        self._pace = pace
        # NICs and names of disks reserved for a VM, by lower-case id: the VM's id, and until when.
        self._reserved: dict[str, tuple[str, float]] = {}
        self._views = views
        self._effects = effects
        self._due: dict[str, float] = {}
        self.contents.keep_only(self.contents_in_use())
        self.exporting = Exporting()
        generations = (resource.hidden.get("generation", 0) for resource in self.state.resources.values())
        self.contents.generation = 1 + max(generations, default=0)

    # time

    def seconds(self) -> float:
        """Azure's time, in seconds, for budgets and reservations."""
        return self.clock.monotonic() * self._pace

    def reserve(self, ids: Iterable[str], vm: str) -> None:
        """Reserve NICs, or names of disks, for a VM that could not be made."""
        until = self.seconds() + RESERVED_SECONDS
        self._reserved |= {id.lower(): (vm, until) for id in ids}

    def reserved(self, id: str) -> bool:
        """Whether an id is reserved for a VM that could not be made."""
        _, until = self._reserved.get(id.lower(), ("", 0.0))
        return self.seconds() < until

    def failed_to_start(self, machine: Resource) -> None:
        """Record that a VM was made but did not start: its NICs stay reserved."""
        self.reserve([str(entry["id"]) for entry in interface_entries(machine)], machine.id)
        machine.hidden["never started"] = True

    def free(self, interfaces: Iterable[str]) -> None:
        """Drop the reservations of NICs."""
        for interface in interfaces:
            self._reserved.pop(interface.lower(), None)

    def not_reserved(self, interface: str, vm: str = "") -> None:
        """Raise NicReservedForAnotherVm if a NIC is reserved for a VM other than `vm`."""
        holder, until = self._reserved.get(interface.lower(), (vm, 0.0))
        if self.seconds() < until and not same(holder, vm):
            raise ArmError(
                400,
                "NicReservedForAnotherVm",
                f"Nic(s) in request is reserved for another Virtual Machine for {RESERVED_SECONDS} seconds. Please "
                f"provide another nic(s) or retry after {RESERVED_SECONDS} seconds. Reserved VM: {holder}",
            )

    # resources

    def view(self, resource: Resource) -> Json:
        """The resource as Azure shows it."""
        show = self._views.get(resource.type.lower())
        return show(self, resource) if show else dict(resource.document)

    def group(self, call: Call) -> Resource:
        """The resource group in the path; raises ResourceGroupNotFound."""
        group = self.state.find(call.group_id)
        if group is None or group.type != GROUPS:
            raise group_not_found(call.part["group"])
        return group

    def existing(self, call: Call, kind: str) -> Resource:
        """The resource that the path names; raises ResourceGroupNotFound or ResourceNotFound."""
        self.group(call)
        resource = self.state.find(call.id_of(kind))
        if resource is None:
            raise not_found(kind, call.part["name"], call.part["group"])
        return resource

    def canonical_id(self, call: Call, kind: str) -> str:
        """The id of a new resource, with the group in its original spelling."""
        return f"{self.group(call).id}/providers/{kind}/{call.part['name']}"

    def unlocked(self, resource_id: str, verb: str) -> None:
        """Raise ScopeLocked if a lock forbids `verb` ("delete" or "write") for this resource."""
        levels = {"delete": ("CanNotDelete", "ReadOnly"), "write": ("ReadOnly",)}[verb]
        scopes = [
            str(lock.hidden["scope"])
            for lock in locks_over(self.state, resource_id)
            if lock.properties["level"] in levels
        ]
        if scopes:
            raise ArmError(
                409,
                "ScopeLocked",
                f"The scope '{resource_id}' cannot perform {verb} operation because following scope(s) are "
                f"locked: '{','.join(scopes)}'. Please remove the lock and try again.",
            )

    # contents

    def contents_in_use(self) -> set[str]:
        """The names of all contents that disks or snapshots use."""
        resources = self.state.resources.values()
        return {resource.hidden["content"] for resource in resources if "content" in resource.hidden}

    def private_content(self, disk: Resource) -> Path:
        """The disk's content as a file that no other resource shares, lent to somebody who writes to it."""
        return self.contents.lend(self.own_content(disk))

    def own_content(self, disk: Resource) -> str:
        """The name of the disk's content, after making sure that no other resource shares it."""
        name: str = disk.hidden["content"]
        users = [
            resource for resource in self.state.resources.values() if resource.hidden.get("content") == name
        ]
        if len(users) > 1:
            disk.hidden["content"] = name = self.contents.duplicate(name)
        return name

    def release_content(self, name: str) -> None:
        """Delete a content if no resource uses it any more."""
        if name not in self.contents_in_use():
            self.contents.remove(name)

    def drop(self, resource: Resource) -> None:
        """Remove a resource, and its content if no other resource uses it."""
        self.state.remove(resource)
        if "content" in resource.hidden:
            self.release_content(resource.hidden["content"])

    # operations

    def begin(
        self,
        call: Call,
        style: str,
        location: str,
        effect: str,
        target: str,
        polling: Polling = _USUAL,
    ) -> dict[str, str]:
        """Start an operation; return the headers that tell the client where to poll it."""
        identity = uuid.uuid4()
        family, segment = _STYLES[style]
        path = f"/subscriptions/{call.subscription}/{family.format(location)}{segment}/{identity}"
        operation = Operation(
            id=str(identity),
            path=path,
            location=location,
            style=style,
            signature=str(uuid.uuid4()),
            started=now(),
            polls=polling.polls,
            effect=effect,
            target=target,
            result=polling.result,
            version=call.query.get("api-version", ""),
        )
        self.state.operations[operation.id] = operation
        self._due[operation.id] = time.monotonic() + PATIENCE
        version = call.query.get("api-version", "")
        headers = self.pause(style)
        if style in {"compute", "network"}:
            headers["Azure-AsyncNotification"] = "Enabled"
        for name in polling.headers:
            monitor = name == "Location"
            polled = (
                path.replace("/operations/", "/operationResults/") if monitor and style == "network" else path
            )
            flag = "&monitor=true" if monitor and style in {"compute", "disk"} else ""
            signature = "&".join(f"{key}={value}" for key, value in self.signature(operation).items())
            headers[name] = (
                f"{call.request.base}{polled}?p={operation.signature}{flag}&api-version={version}&{signature}"
            )
        return headers

    def pause(self, style: str) -> dict[str, str]:
        """The header that says how long to wait before the next poll of an operation."""
        return {"Retry-After": _RETRY_AFTER[style]} if self._pace == 1 else {"x-ms-retry-after-ms": "10"}

    def signature(self, operation: Operation) -> dict[str, str]:
        """The signature in an operation's URL, as long as Azure's. A poll without any part of it is refused."""
        key = self.state.identity.signing_key.encode()
        digest = hmac.new(key, operation.id.encode(), hashlib.sha256).hexdigest()
        certificate = hashlib.shake_256(digest.encode()).hexdigest(2000)
        return {"t": str(int(digest[:14], 16)), "c": f"MIIH{certificate}", "s": digest, "h": digest[:32]}

    def finish(self, operation: Operation) -> None:
        """Complete an operation, unless it has already ended."""
        if operation.ended is not None:
            return
        try:
            if operation.fault is None:
                self._effects[operation.effect](self, operation.target)
            else:
                self._fail(operation, operation.fault)
        except ArmError as error:
            operation.error = error.document()
        operation.ended = now()
        self._due.pop(operation.id, None)

    def _fail(self, operation: Operation, fault: Json) -> None:
        """Fail an operation; its resource stays, in the state Failed."""
        operation.error = fault
        target = self.state.find(operation.target)
        if target is not None:
            if target.type == MACHINES and target.properties["provisioningState"] == "Creating":
                self.failed_to_start(target)
            target.properties["provisioningState"] = "Failed"

    def pending(self, target: str) -> list[Operation]:
        """The operations on a resource that have not ended."""
        return [operation for operation in self._active() if same(operation.target, target)]

    def finish_overdue(self) -> None:
        """End operations that no client has polled for a while, unless they wait for a guest to boot."""
        moment = time.monotonic()
        for operation in self._active():
            if self._due.get(operation.id, 0.0) <= moment and not self.guests.booting(operation.target):
                self.finish(operation)

    def finish_all(self) -> None:
        """End every operation that can end now."""
        for operation in self._active():
            if not self.guests.booting(operation.target):
                self.finish(operation)

    def _active(self) -> list[Operation]:
        return [operation for operation in self.state.operations.values() if operation.ended is None]


_STYLES = {
    "compute": ("providers/Microsoft.Compute/locations/{0}/", "operations"),
    "disk": ("providers/Microsoft.Compute/locations/{0}/", "DiskOperations"),
    "network": ("providers/Microsoft.Network/locations/{0}/", "operations"),
    "group": ("", "operationresults"),
}


def now() -> str:
    """The present time in Azure's format."""
    return datetime.now(timezone.utc).isoformat()


def not_found(kind: str, name: str, group: str) -> ArmError:
    """404 ResourceNotFound, in the gateway's words."""
    return ArmError(
        404,
        "ResourceNotFound",
        f"The Resource '{kind}/{name}' under resource group '{group}' was not found. For more details "
        "please go to https://aka.ms/ARMResourceNotFoundFix",
    )


def group_not_found(name: str) -> ArmError:
    """404 ResourceGroupNotFound."""
    return ArmError(404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found.")


def deleted(world: World, call: Call, kind: str) -> Resource | None:
    """The resource that a DELETE names, after checking locks; None if it is absent, which is no error (204)."""
    world.group(call)
    resource = world.state.find(call.id_of(kind))
    if resource is not None:
        world.unlocked(resource.id, "delete")
    return resource


def no_content() -> Response:
    """204: nothing to delete."""
    return Response(204)


def placed(world: World, call: Call, kind: str, existing: Resource | None) -> str:
    """The location in a PUT; raises LocationRequired, InvalidResourceLocation, ..."""
    location = str(call.body.get("location") or "").replace(" ", "").lower()
    if not location:
        raise ArmError(400, "LocationRequired", "The location property is required for this definition.")
    if location not in LOCATIONS:
        raise ArmError(
            400,
            "LocationNotAvailableForResourceType",
            f"The provided location '{location}' is not available for resource type '{kind}'. List of "
            f"available regions for the resource type is '{','.join(LOCATIONS)}'.",
        )
    if existing is not None and not same(existing.location, location):
        raise ArmError(
            409,
            "InvalidResourceLocation",
            f"The resource '{existing.name}' already exists in location '{existing.location}' in resource "
            f"group '{call.part['group']}'. A resource with the same name cannot be created in location "
            f"'{location}'. Please select a new resource name.",
        )
    world.unlocked(world.canonical_id(call, kind), "write")
    return location


def checked_tags(body: Json) -> Json:
    """The tags of a PUT or PATCH; 400 for too many, too long ones or forbidden characters."""
    tags = body.get("tags") or {}
    if len(tags) > 50:
        raise ArmError(
            400, "InvalidTagNumber", f"The number of tags '{len(tags)}' is larger than the maximum of '50'."
        )
    for name, value in tags.items():
        if not name or len(name) > 512 or set(name) & set("<>%&\\?/"):
            raise ArmError(
                400,
                "InvalidTagNameCharacters",
                f"The tag name '{name}' has reserved characters '<,>,%,&,\\,?,/' or a wrong length.",
            )
        if not isinstance(value, str) or len(value) > 256:
            raise ArmError(
                400,
                "InvalidTagValueLength",
                f"The value of tag '{name}' is not text of at most 256 characters.",
            )
    return dict(tags)


def checked_zones(body: Json, location: str) -> list[str] | None:
    """The zones of a PUT; 400 if the region does not have them."""
    zones = body.get("zones") or None
    if zones is None:
        return None
    if not isinstance(zones, list) or any(zone not in LOCATIONS[location][1] for zone in zones):
        raise ArmError(
            400,
            "InvalidAvailabilityZone",
            f"The zone(s) '{zones}' is not available for the location '{location}'.",
        )
    return [str(zone) for zone in zones]


def paged(world: World, call: Call, rows: list[Json]) -> Response:
    """One page of a list, with the link to the next one."""
    start = int(call.query.get("$skiptoken") or 0)
    top = call.query.get("$top", "")
    length = min(int(top), world.page_size) if top.isdigit() and int(top) else world.page_size
    document: Json = {"value": rows[start : start + length]}
    if start + length < len(rows):
        other = {name: value for name, value in call.query.items() if name != "$skiptoken"}
        query = urlencode({**other, "$skiptoken": str(start + length)})
        document["nextLink"] = f"{call.request.base}{quote(call.request.path)}?{query}"
    return Response.of(200, document)
