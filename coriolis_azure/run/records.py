"""The records of volumes: empty network security groups, whose tags say what a volume holds and who may write to it.

Azure is the only store that every host of a transfer reaches and that outlives all of them. A security group costs
nothing, is there as soon as Azure has answered, and is changed only by a request that names the version it was read
in. What a record means: `plugin.claims`.
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
class Kept:
    """A record as `cleanup` lists it: its resource, the VM, and when a run last had to do with the volume."""

    id: str
    instance: str
    alive: datetime | None
    record: Record

    def to_json(self) -> Json:
        """Plain JSON values."""
        alive = names.stamp(self.alive) if self.alive else None
        return {"id": self.id, "instance": self.instance, "alive": alive, **self._said()}

    def _said(self) -> Json:
        return {"holds": self.record.holds, "writer": self.record.writer}


class Records:
    """The records in the resource group of `run`, made with the user's `tags`. A claims.Records."""

    def __init__(self, azure: Azure, run: Run, tags: Mapping[str, str], clock: Clock) -> None:
        self._azure, self._run, self._tags, self._clock = azure, run, tags, clock

    def find(self, id: str) -> Record | None:
        """The record `id`, None where there is none."""
        document = self._azure.find(self._arm(id))
        return _record(document) if document is not None else None

    def of_disk(self, disk: str) -> list[Record]:
        """The records of all volumes that are copies of `disk`."""
        return [kept.record for kept in self.all() if kept.record.disk == disk]

    def all(self) -> list[Kept]:
        """Every record in the group."""
        return [
            _kept(document) for document in self._azure.resources("nsg", self._run.group) if _is(document)
        ]

    def update(self, id: str, change: Callable[[Record | None], Record]) -> Record:
        """Change the record `id` to what `change` makes of it; done again where another was faster."""

        def once() -> Record:
            document = self._azure.find(self._arm(id)) or {}
            wanted = change(_record(document) if document else None)
            body = {"location": self._run.location, "tags": self._tags_of(document, wanted), "properties": {}}
            self._azure.put(self._arm(id), body, document.get("etag", ""))
            return wanted

        return patiently(once, f"recording the volume {id}", self._clock)

    def delete(self, id: str) -> list[str]:
        """Forget a volume: what it holds is not known any more. Gives back the resource's id where it stayed."""
        return delete(self._azure, [self._arm(id)], self._clock)

    def _tags_of(self, document: Json, record: Record) -> dict[str, str]:
        now = self._azure.now(self._clock)
        made = names.tags("", "volume", self._run.instance, now, self._tags)
        del made[names.RUN_TAG]
        said = {
            names.VOLUME_TAG: record.id,
            names.DISK_TAG: record.disk,
            names.HOLDS_TAG: record.holds,
            names.WRITER_TAG: record.writer,
            names.ALIVE_TAG: now.isoformat(timespec="milliseconds"),
        }
        ours = {name.lower() for name in said}
        kept = {name: tag for name, tag in (document.get("tags") or made).items() if name.lower() not in ours}
        return kept | {name: tag for name, tag in said.items() if tag}

    def _arm(self, id: str) -> str:
        return names.resource_id(self._run.subscription, self._run.group, "nsg", names.resource(id, "volume"))


def _is(document: Json) -> bool:
    return bool(_tag(document, names.VOLUME_TAG))


def _record(document: Json) -> Record:
    found = (names.VOLUME_TAG, names.DISK_TAG, names.HOLDS_TAG, names.WRITER_TAG, names.ALIVE_TAG)
    return Record(*(_tag(document, name) for name in found))


def _kept(document: Json) -> Kept:
    record = _record(document)
    signs = [names.moment(_tag(document, name)) for name in (names.ALIVE_TAG, names.MADE_TAG)]
    return Kept(document["id"], _tag(document, names.INSTANCE_TAG), next(filter(None, signs), None), record)


def _tag(document: Json, name: str) -> str:
    """The value of a tag, "" where there is none; names of tags have no case."""
    tags = names.tags_of(document)
    return str(next((tag for key, tag in tags.items() if key.lower() == name), ""))
