"""The sandbox's one mutable whole: state, disk contents, guests and long-running operations.

The provider modules (`disks`, `machines`, `network`, `groups`) are functions of a `World` and a `Call`;
they register how a resource is shown (`VIEWS`) and how an operation ends (`EFFECTS`).

What a request changes is done at once, except what Azure does late: a resource is not Succeeded, a
deletion or a detach is not done, before its operation has ended. It ends at its last poll. When its client
is gone it ends with the first other request after `PATIENCE` seconds, or when the sandbox starts again.
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
from coriolis_azure.sandbox.guest.guests import Guests
from coriolis_azure.sandbox.relations import GROUPS, MACHINES, interface_entries, locks_over, same
from coriolis_azure.sandbox.state import Operation, Resource, State
from coriolis_azure.sandbox.storage.store import BlobStore
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response

# The base of this sandbox's URLs until it is served: of requests that never leave the process.
INSIDE = "https://sandbox.invalid"
PATIENCE = 0.25
# How long Azure keeps the NICs of a VM that it could not make.
RESERVED_SECONDS = 180
# How long to wait between two looks at an operation: as recorded, where the sandbox keeps Azure's own time.
_RETRY_AFTER = {"compute": "10", "disk": "2", "network": "10", "group": "15"}

View = Callable[["World", Resource], Json]
Effect = Callable[["World", str], None]


@dataclass(frozen=True)
class Call:
    """A request whose path was understood: `part` has the path's variables by name."""

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
        """The id of the named resource in the path; `kind` gives the spelling of its type."""
        return f"{self.group_id}/providers/{kind}/{self.part['name']}"


class World:
    """See the module. Not thread-safe by itself: the sandbox holds one lock around each request."""

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
        # Where the sandbox is reached.
        self.base = INSIDE
        self.page_size = 100
        self.api_profile = "latest"
        # Whether a disk can be imported from a snapshot of a blob.
        self.imports_snapshots = True
        # The most page ranges that one answer lists.
        self.page_ranges = 10_000
        # What the usage lists say instead of the truth: (in use, limit) by name.
        self.quotas: dict[str, tuple[int, int]] = {}
        # The tags without which a policy lets nothing be made.
        self.required_tags: list[str] = []
        # The identity's roles, as the permissions list shows them.
        self.permissions: list[Json] = [
            {"actions": ["*"], "notActions": [], "dataActions": ["*"], "notDataActions": []}
        ]
        self.clock = clock
        self.budgets = Budgets(self.seconds, pace)
        self._pace = pace
        # The NICs, and the names of disks, that are kept for a VM, by lower-cased id: the VM's id, and until when.
        self._reserved: dict[str, tuple[str, float]] = {}
        self._views = views
        self._effects = effects
        self._due: dict[str, float] = {}
        self.contents.keep_only(self.contents_in_use())

    # time

    def seconds(self) -> float:
        """Seconds of Azure's time: of what it grants, or holds, for a while."""
        return self.clock.monotonic() * self._pace

    def reserve(self, ids: Iterable[str], vm: str) -> None:
        """Keep NICs, or the names of disks, for a VM that could not be made."""
        until = self.seconds() + RESERVED_SECONDS
        self._reserved |= {id.lower(): (vm, until) for id in ids}

    def reserved(self, id: str) -> bool:
        """Whether an id is kept for a VM that could not be made."""
        _, until = self._reserved.get(id.lower(), ("", 0.0))
        return self.seconds() < until

    def failed_to_start(self, machine: Resource) -> None:
        """What follows from a VM that was made and did not start."""
        self.reserve([str(each["id"]) for each in interface_entries(machine)], machine.id)
        machine.hidden["never started"] = True

    def free(self, interfaces: Iterable[str]) -> None:
        """Keep NICs no longer."""
        for interface in interfaces:
            self._reserved.pop(interface.lower(), None)

    def not_reserved(self, interface: str, vm: str = "") -> None:
        """NicReservedForAnotherVm when a NIC is kept for another VM than `vm`."""
        keeper, until = self._reserved.get(interface.lower(), (vm, 0.0))
        if self.seconds() < until and not same(keeper, vm):
            raise ArmError(
                400,
                "NicReservedForAnotherVm",
                f"Nic(s) in request is reserved for another Virtual Machine for {RESERVED_SECONDS} seconds. Please "
                f"provide another nic(s) or retry after {RESERVED_SECONDS} seconds. Reserved VM: {keeper}",
            )

    # resources

    def view(self, resource: Resource) -> Json:
        """The resource as Azure shows it."""
        show = self._views.get(resource.type.lower())
        return show(self, resource) if show else dict(resource.document)

    def group(self, call: Call) -> Resource:
        """The resource group of the path; ResourceGroupNotFound."""
        group = self.state.find(call.group_id)
        if group is None or group.type != GROUPS:
            raise group_not_found(call.part["group"])
        return group

    def existing(self, call: Call, kind: str) -> Resource:
        """The named resource of the path; ResourceGroupNotFound, ResourceNotFound."""
        self.group(call)
        resource = self.state.find(call.id_of(kind))
        if resource is None:
            raise not_found(kind, call.part["name"], call.part["group"])
        return resource

    def canonical_id(self, call: Call, kind: str) -> str:
        """The id a new resource gets: its group is spelled as the group was."""
        return f"{self.group(call).id}/providers/{kind}/{call.part['name']}"

    def unlocked(self, resource_id: str, verb: str) -> None:
        """ScopeLocked when a lock forbids to `verb` ("delete" or "write") this resource."""
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
        """The names of all contents that a disk or snapshot has."""
        return {each.hidden["content"] for each in self.state.resources.values() if "content" in each.hidden}

    def private_content(self, disk: Resource) -> Path:
        """The disk's content as a file that nobody else has: for whoever may write to it."""
        name = disk.hidden["content"]
        sharers = [each for each in self.state.resources.values() if each.hidden.get("content") == name]
        if len(sharers) > 1:
            disk.hidden["content"] = self.contents.copied(self.contents.path(name))
        return self.contents.path(disk.hidden["content"])

    def release_content(self, name: str) -> None:
        """Delete a content if no resource has it any more."""
        if name not in self.contents_in_use():
            self.contents.remove(name)

    def drop(self, resource: Resource) -> None:
        """Remove a resource, and its content if it was the last to have it."""
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
        *,
        polls: int = 0,
        result: bool = False,
        follow: tuple[str, ...] = ("Azure-AsyncOperation", "Location"),
    ) -> dict[str, str]:
        """Start an operation: the headers that tell the client where to ask about it."""
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
            polls=polls,
            effect=effect,
            target=target,
            result=result,
            version=call.query.get("api-version", ""),
        )
        self.state.operations[operation.id] = operation
        self._due[operation.id] = time.monotonic() + PATIENCE
        version = call.query.get("api-version", "")
        headers = self.pause(style)
        if style in {"compute", "network"}:
            headers["Azure-AsyncNotification"] = "Enabled"
        for name in follow:
            monitor = name == "Location"
            where = (
                path.replace("/operations/", "/operationResults/") if monitor and style == "network" else path
            )
            mark = "&monitor=true" if monitor and style in {"compute", "disk"} else ""
            signature = "&".join(f"{key}={value}" for key, value in self.signature(operation).items())
            headers[name] = (
                f"{call.request.base}{where}?p={operation.signature}{mark}&api-version={version}&{signature}"
            )
        return headers

    def pause(self, style: str) -> dict[str, str]:
        """The header that says how long to wait before an operation is asked about."""
        return {"Retry-After": _RETRY_AFTER[style]} if self._pace == 1 else {"x-ms-retry-after-ms": "10"}

    def signature(self, operation: Operation) -> dict[str, str]:
        """What an operation's URL carries, as long as Azure's: it is refused when any of it is missing."""
        key = self.state.identity.signing_key.encode()
        digest = hmac.new(key, operation.id.encode(), hashlib.sha256).hexdigest()
        certificate = hashlib.shake_256(digest.encode()).hexdigest(2000)
        return {"t": str(int(digest[:14], 16)), "c": f"MIIH{certificate}", "s": digest, "h": digest[:32]}

    def finish(self, operation: Operation) -> None:
        """Do what is left of an operation, once."""
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
        """An operation that fails leaves its resource behind, in the state Failed."""
        operation.error = fault
        target = self.state.find(operation.target)
        if target is not None:
            if target.type == MACHINES and target.properties["provisioningState"] == "Creating":
                self.failed_to_start(target)
            target.properties["provisioningState"] = "Failed"

    def pending(self, target: str) -> list[Operation]:
        """The operations on a resource that have not ended."""
        return [
            each
            for each in self.state.operations.values()
            if each.ended is None and same(each.target, target)
        ]

    def finish_overdue(self) -> None:
        """End what no client has asked about for a while, unless it still waits for a guest to boot."""
        moment = time.monotonic()
        for operation in [each for each in self.state.operations.values() if each.ended is None]:
            if self._due.get(operation.id, 0.0) <= moment and not self.guests.booting(operation.target):
                self.finish(operation)

    def finish_all(self) -> None:
        """End everything that can end now."""
        for operation in [each for each in self.state.operations.values() if each.ended is None]:
            if not self.guests.booting(operation.target):
                self.finish(operation)


_STYLES = {
    "compute": ("providers/Microsoft.Compute/locations/{0}/", "operations"),
    "disk": ("providers/Microsoft.Compute/locations/{0}/", "DiskOperations"),
    "network": ("providers/Microsoft.Network/locations/{0}/", "operations"),
    "group": ("", "operationresults"),
}


def now() -> str:
    """This moment as Azure writes it."""
    return datetime.now(timezone.utc).isoformat()


def not_found(kind: str, name: str, group: str) -> ArmError:
    """404 ResourceNotFound, as the gateway words it."""
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
    """The resource a DELETE means, unlocked; None when it is absent, which is no error (204)."""
    world.group(call)
    resource = world.state.find(call.id_of(kind))
    if resource is not None:
        world.unlocked(resource.id, "delete")
    return resource


def no_content() -> Response:
    """204: there was nothing to delete."""
    return Response(204)


def placed(world: World, call: Call, kind: str, existing: Resource | None) -> str:
    """The location a PUT names; LocationRequired, InvalidResourceLocation, ..."""
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
    """The tags of a PUT or PATCH; 400 for too many, too long or forbidden characters."""
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
    """The zones of a PUT; 400 when the region has none of that name."""
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
    """One page of a list, and where the next one is."""
    start = int(call.query.get("$skiptoken") or 0)
    top = call.query.get("$top", "")
    length = min(int(top), world.page_size) if top.isdigit() and int(top) else world.page_size
    document: Json = {"value": rows[start : start + length]}
    if start + length < len(rows):
        kept = {name: value for name, value in call.query.items() if name != "$skiptoken"}
        query = urlencode({**kept, "$skiptoken": str(start + length)})
        document["nextLink"] = f"{call.request.base}{quote(call.request.path)}?{query}"
    return Response.of(200, document)
