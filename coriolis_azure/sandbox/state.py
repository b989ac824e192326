"""What exists in the sandbox: resources by id, pending operations, and the file that keeps both.

`document` is what Azure would show, less what follows from other resources (who has a disk attached, which
NIC holds an address): that is computed when read, so it cannot disagree. `hidden` is ours. Ids are
compared in lower case and kept as they were first written.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coriolis_azure.sandbox.wire import Json

_FINISHED_KEPT = 50


@dataclass
class Resource:
    """One resource."""

    document: Json
    hidden: Json = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its ARM id."""
        return str(self.document["id"])

    @property
    def name(self) -> str:
        """The last part of its id."""
        return str(self.document["name"])

    @property
    def type(self) -> str:
        """Provider and type, such as Microsoft.Compute/disks."""
        return str(self.document["type"])

    @property
    def location(self) -> str:
        """Its region."""
        return str(self.document.get("location", ""))

    @property
    def properties(self) -> Json:
        """The inner document."""
        properties: Json = self.document["properties"]
        return properties


@dataclass
class Operation:
    """A long-running operation: how it is asked about, and what is left to do when it ends.

    `polls` counts down the answers "InProgress". `fault` is the error with which it ends instead of having its effect,
    where a rule of `faults` says so. `effect` names the function of the `arm` module's table that
    ends it; it is applied at the last poll or, when the client has gone, after a moment.
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
    """Who may talk to this sandbox, and under which names."""

    subscription: str = field(default_factory=lambda: str(uuid.uuid4()))
    tenant: str = field(default_factory=lambda: str(uuid.uuid4()))
    client_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    client_secret: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    signing_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


class State:
    """Everything that survives a restart; `save` writes it as one file, whole or not at all."""

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
            str(each["document"]["id"]).lower(): Resource(**each) for each in document["resources"]
        }
        self.operations = {each["id"]: Operation(**each) for each in document["operations"]}

    def save(self) -> None:
        """Write what changed since the last time; a crash leaves the old file or the new one."""
        for old in [each.id for each in self.operations.values() if each.ended][:-_FINISHED_KEPT]:
            del self.operations[old]
        everything = {
            "identity": self.identity,
            "resources": list(self.resources.values()),
            "operations": list(self.operations.values()),
        }
        text = json.dumps(everything, default=vars)  # dataclasses, without a copy of each at each request
        if text == self._saved:
            return
        temporary = self._path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(text)
        temporary.replace(self._path)
        self._saved = text

    def find(self, resource_id: str) -> Resource | None:
        """The resource of that id, in any case."""
        return self.resources.get(resource_id.lower())

    def add(self, resource: Resource) -> Resource:
        """Keep a new resource."""
        self.resources[resource.id.lower()] = resource
        return resource

    def remove(self, resource: Resource) -> None:
        """Forget a resource."""
        self.resources.pop(resource.id.lower(), None)

    def of_type(self, kind: str) -> Iterator[Resource]:
        """All resources of one type, in the order of their making."""
        kind = kind.lower()
        return iter([each for each in self.resources.values() if each.type.lower() == kind])
