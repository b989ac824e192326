"""The records of volumes: empty network security groups whose tags say what a volume holds and who may write to it.

Azure is the only store that every host of a transfer can reach and that outlives all of them. A security group costs
nothing, exists as soon as Azure has answered, and supports updates conditional on its ETag. `plugin.claims` defines
what a record means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from ..azure import names
from ..azure.client import Azure
from ..clock import Clock
from ..model import Json, Record, Run
from .resources import delete, patiently


@dataclass(frozen=True)
class VolumeRecord:
    """A record as `cleanup` lists it: its resource, the VM, and when a run last used the volume."""

    id: str
    instance: str
    alive: datetime | None
    record: Record

    def to_json(self) -> Json:
        """Plain JSON values."""
        alive = names.stamp(self.alive) if self.alive else None
        holds, writer = self.record.holds, self.record.writer
        return {"id": self.id, "instance": self.instance, "alive": alive, "holds": holds, "writer": writer}


class Records:
    """The records in the resource group of `run`, created with the user's `tags`. Implements claims.Records."""

    def __init__(self, azure: Azure, run: Run, tags: Mapping[str, str], clock: Clock) -> None:
        self._azure, self._run, self._tags, self._clock = azure, run, tags, clock

    def find(self, id: str) -> Record | None:
        """The record `id`; None if there is none."""
        document = self._azure.find(self._arm(id))
        return _record(document) if document is not None else None

    def of_disk(self, disk: str) -> list[Record]:
        """The records of all volumes that are copies of `disk`."""
        return [each.record for each in self.all() if each.record.disk == disk]

    def all(self) -> list[VolumeRecord]:
        """Every record in the group."""
        return [
            _volume_record(document)
            for document in self._azure.resources("nsg", self._run.group)
            if _is(document)
        ]

    def update(self, id: str, change: Callable[[Record | None], Record]) -> Record:
        """Apply `change` to the record `id` and return the result; retry if somebody else changed it meanwhile."""

        def once() -> Record:
            document = self._azure.find(self._arm(id)) or {}
            updated = change(_record(document) if document else None)
            body = {
                "location": self._run.location,
                "tags": self._tags_of(document, updated),
                "properties": {},
            }
            self._azure.put(self._arm(id), body, document.get("etag", ""))
            return updated

        return patiently(once, f"recording the volume {id}", self._clock)

    def delete(self, id: str) -> list[str]:
        """Delete the record of a volume, whose content is then unknown. Returns the id if it cannot be deleted."""
        return delete(self._azure, [self._arm(id)], self._clock)

    def _tags_of(self, document: Json, record: Record) -> dict[str, str]:
        now = self._azure.now(self._clock)
        initial = names.tags("", "volume", self._run.instance, now, self._tags)
        del initial[names.RUN_TAG]
        current = {
            names.VOLUME_TAG: record.id,
            names.DISK_TAG: record.disk,
            names.HOLDS_TAG: record.holds,
            names.WRITER_TAG: record.writer,
            names.ALIVE_TAG: now.isoformat(timespec="milliseconds"),
        }
        replaced = {name.lower() for name in current}
        tags = (document.get("tags") or initial).items()
        others = {name: tag for name, tag in tags if name.lower() not in replaced}
        return others | {name: tag for name, tag in current.items() if tag}

    def _arm(self, id: str) -> str:
        return names.resource_id(self._run.subscription, self._run.group, "nsg", names.resource(id, "volume"))


def _is(document: Json) -> bool:
    return bool(_tag(document, names.VOLUME_TAG))


def _record(document: Json) -> Record:
    fields = (names.VOLUME_TAG, names.DISK_TAG, names.HOLDS_TAG, names.WRITER_TAG, names.ALIVE_TAG)
    return Record(*(_tag(document, name) for name in fields))


def _volume_record(document: Json) -> VolumeRecord:
    record = _record(document)
    signs = [names.moment(_tag(document, name)) for name in (names.ALIVE_TAG, names.MADE_TAG)]
    return VolumeRecord(
        document["id"], _tag(document, names.INSTANCE_TAG), next(filter(None, signs), None), record
    )


def _tag(document: Json, name: str) -> str:
    """The value of a tag, whose name is case-insensitive; "" if there is none."""
    tags = names.tags_of(document)
    return str(next((tag for key, tag in tags.items() if key.lower() == name), ""))
