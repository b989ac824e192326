"""Where baselines are: managed snapshots in a resource group, or snapshots of VHD blobs in storage accounts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from .. import vhd
from ..azure import names
from ..azure.blobs import Blob
from ..azure.context import Context
from ..azure.vhd_snapshots import document, tags_of
from ..errors import AzureError, DeadlinePassed, NotFound
from ..model import Json, at
from .resources import end_access, is_open

LOG = logging.getLogger(__name__)
_CLOSED = {"networkAccessPolicy": "DenyAll", "publicNetworkAccess": "Disabled"}
_OPEN = {"networkAccessPolicy": "AllowAll", "publicNetworkAccess": "Enabled"}


class Shelf(Protocol):
    """What can be done with the baselines of one kind. Ids are those that `Baseline` has."""

    def open(self, id: str, stream: str) -> Json | None:
        """Let it be read, and return Azure's document of it; None if it is gone or not of this stream."""

    def close(self, id: str) -> None:
        """Let it no longer be read. A failure is only logged: it is deleted when the run ends well."""

    def keep(self, id: str, tags: Mapping[str, str]) -> None:
        """Make it outlive the run that took it. Raises AzureError if that fails, or if a policy rewrites the tags."""

    def journaled(self, id: str, run: str) -> str:
        """The id that the journal of the run that took it has."""

    def of(self, ids: Iterable[str]) -> list[Json]:
        """All baselines that may be of the streams of these: documents with an id to delete, tags and `baseline`."""


class Managed:
    """Managed snapshots: they are tagged when they are kept, and closed between runs."""

    def __init__(self, context: Context) -> None:
        self._azure, self._clock = context.azure, context.clock
        self._group = context.environment.resource_group

    def open(self, id: str, stream: str) -> Json | None:
        """See Shelf."""
        found = self._azure.find(id)
        if found is None or names.tags_of(found).get(names.BASELINE_TAG) != stream:
            return None
        self._azure.patch_snapshot(id, {"properties": _OPEN})
        return found

    def close(self, id: str) -> None:
        """See Shelf."""
        try:
            end_access(self._azure, id, self._clock)
            self._azure.patch_snapshot(id, {"properties": _CLOSED})
        except (AzureError, DeadlinePassed) as error:
            LOG.warning("the access to %s could not be ended: %s", id, error)

    def keep(self, id: str, tags: Mapping[str, str]) -> None:
        """See Shelf."""
        if is_open(self._azure.get(id)):  # ending the access has failed
            end_access(self._azure, id, self._clock)
        changed = self._azure.patch_snapshot(id, {"tags": dict(tags), "properties": _CLOSED})
        found = names.tags_of(changed or self._azure.get(id))
        if any(found.get(name) != tags[name] for name in (names.BASELINE_TAG, names.UNTIL_TAG)):
            raise AzureError("its tags are not those that it was given, so no later run would find it")

    def journaled(self, id: str, run: str) -> str:
        """See Shelf."""
        del run
        return id

    def of(self, ids: Iterable[str]) -> list[Json]:
        """See Shelf: all of the resource group."""
        del ids
        found = self._azure.resources("snapshot", self._group)
        return [
            {**each, "baseline": each["id"]} for each in found if names.BASELINE_TAG in names.tags_of(each)
        ]


def left_open(snapshots: Iterable[Json], alive: Collection[str]) -> list[str]:
    """The ids of the baselines that can be read although no run is alive that reads them: it died.

    `snapshots`: Azure's documents; `alive`: the instances of the runs that are.
    """
    tagged = [(each, names.tags_of(each)) for each in snapshots]
    return [
        str(each["id"])
        for each, tags in tagged
        if names.BASELINE_TAG in tags
        and tags.get(names.INSTANCE_TAG, "") not in alive
        and (is_open(each) or at(each, "properties.networkAccessPolicy") == _OPEN["networkAccessPolicy"])
    ]


class Vhds:
    """Snapshots of VHD blobs: only those who may read the account can read them, and they are tagged when taken."""

    def __init__(self, context: Context) -> None:
        self._storage = context.storage

    def open(self, id: str, stream: str) -> Json | None:
        """See Shelf."""
        blob = self._storage.at(id)
        properties = blob.find() if blob is not None else None
        if blob is None or properties is None:
            return None
        found = document(blob, properties)
        return found if found["tags"].get(names.BASELINE_TAG) == stream else None

    def close(self, id: str) -> None:
        """See Shelf. Nobody else could read it."""

    def keep(self, id: str, tags: Mapping[str, str]) -> None:
        """See Shelf. It has its tags."""

    def journaled(self, id: str, run: str) -> str:
        """See Shelf."""
        return names.BlobsId.of(id.partition("?")[0], run)

    def of(self, ids: Iterable[str]) -> list[Json]:
        """See Shelf: those of the same blobs."""
        urls = dict.fromkeys(id.partition("?")[0] for id in ids)
        return [each for url in urls if (blob := self._storage.at(url)) is not None for each in _of(blob)]


def _of(blob: Blob) -> list[Json]:
    container = blob.account.container(blob.container)
    try:
        listed = [each for each in container.blobs(blob.name, past=True) if each.name == blob.name]
    except NotFound:
        return []
    found = [(each, tags_of(each.metadata)) for each in listed if each.snapshot]
    return [
        {
            "id": names.BlobsId.of(blob.url, tags[names.BY_TAG]),
            "baseline": blob.at(each.snapshot).url,
            "tags": tags,
            "properties": {
                "diskSizeBytes": each.size - vhd.FOOTER,
                "creationData": {"sourceResourceId": blob.url},
            },
        }
        for each, tags in found
        if names.BASELINE_TAG in tags and names.BY_TAG in tags
    ]


def vhds_of(vms: Iterable[Json]) -> list[str]:
    """The URLs of the VHDs that are disks of these VMs."""
    return [
        str(uri)
        for vm in vms
        for entry in (
            at(vm, "properties.storageProfile.osDisk", {}),
            *at(vm, "properties.storageProfile.dataDisks", []),
        )
        if (uri := at(entry, "vhd.uri"))
    ]
