"""The sandbox's resources by id, its operations, and the file that stores both.

A resource's `document` is what Azure would show, except for facts that follow from other resources (which VM has a disk
attached, which NIC has an address): those are computed on reading, so they cannot become inconsistent. `hidden` is
our own data. Ids are compared in lower case and stored in their first spelling.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coriolis_azure.sandbox.wire import Json

_FINISHED_KEPT = 50  # finished operations that are stored


@dataclass
class Resource:
    """One resource."""

    document: Json
    hidden: Json = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The ARM id."""
        return str(self.document["id"])

    @property
    def name(self) -> str:
        """The last part of the id."""
        return str(self.document["name"])

    @property
    def type(self) -> str:
        """Provider and type, such as Microsoft.Compute/disks."""
        return str(self.document["type"])

    @property
    def location(self) -> str:
        """The region."""
        return str(self.document.get("location", ""))

    @property
    def properties(self) -> Json:
        """The `properties` of the document."""
        properties: Json = self.document["properties"]
        return properties


@dataclass
class Operation:
    """A long-running operation: how to poll it, and what to do when it ends.

    `polls` counts down the remaining answers "InProgress". `effect` names the function in the `arm` module's table that
    completes it, at the last poll or, if the client is gone, shortly afterwards. `fault` is the error with which it
    ends instead, if a rule of `faults` says so.
    """

    id: str
    path: str
    location: str
    style: str
    signature: str
    started: str
    polls: int
    effect: str
    target: str
    ended: str | None = None
    error: Json | None = None
    result: bool = False
    fault: Json | None = None
    version: str = ""


@dataclass
class Identity:
    """The sandbox's subscription and tenant, and the one identity that may use it."""

    subscription: str = field(default_factory=lambda: str(uuid.uuid4()))
    tenant: str = field(default_factory=lambda: str(uuid.uuid4()))
    client_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    client_secret: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    signing_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


class State:
    """Everything that survives a restart; `save` writes it atomically to one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.identity = Identity()
        self.resources: dict[str, Resource] = {}
        self.operations: dict[str, Operation] = {}
        self._saved = ""
        if path.exists():
            self._load(json.loads(path.read_text()))

    def _load(self, document: Json) -> None:
        self.identity = Identity(**document["identity"])
        self.resources = {
            str(record["document"]["id"]).lower(): Resource(**record) for record in document["resources"]
        }
        self.operations = {record["id"]: Operation(**record) for record in document["operations"]}

    def save(self) -> None:
        """Write the state if it has changed; a crash leaves the old file or the new one."""
        finished = [operation.id for operation in self.operations.values() if operation.ended]
        for id in finished[:-_FINISHED_KEPT]:
            del self.operations[id]
        everything = {
            "identity": self.identity,
            "resources": list(self.resources.values()),
            "operations": list(self.operations.values()),
        }
        text = json.dumps(everything, default=vars)  # unlike asdict, this does not copy each dataclass
        if text == self._saved:
            return
        temporary = self._path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(text)
        temporary.replace(self._path)
        self._saved = text

    def find(self, resource_id: str) -> Resource | None:
        """The resource with this id, ignoring case."""
        return self.resources.get(resource_id.lower())

    def add(self, resource: Resource) -> Resource:
        """Add a new resource."""
        self.resources[resource.id.lower()] = resource
        return resource

    def remove(self, resource: Resource) -> None:
        """Remove a resource."""
        self.resources.pop(resource.id.lower(), None)

    def of_type(self, kind: str) -> Iterator[Resource]:
        """All resources of one type, oldest first."""
        kind = kind.lower()
        return iter([resource for resource in self.resources.values() if resource.type.lower() == kind])
