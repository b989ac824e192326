"""Reading exported disks with the official SDKs: grants, blobs, page lists and differences."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from azure.storage.blob import BlobClient

from coriolis_azure.sandbox import Sandbox
from coriolis_azure.sandbox.compute.inside import Inside
from harness.clients import GROUP, Clients

VERSION = "2021-04-10"


def grant(azure: Clients, snapshot: str, seconds: int = 3600) -> str:
    """A SAS for a snapshot."""
    body: Any = {"access": "Read", "durationInSeconds": seconds}
    return str(azure.compute.snapshots.begin_grant_access(GROUP, snapshot, body).result().access_sas)


def revoke(azure: Clients, snapshot: str) -> None:
    """End all access to a snapshot."""
    azure.compute.snapshots.begin_revoke_access(GROUP, snapshot).result()


def snapshot(azure: Clients, name: str, disk: str, **properties: Any) -> Any:
    """Take an incremental snapshot."""
    return azure.copy(name, disk, snapshot=True, **{"incremental": True, **properties})


@contextmanager
def blob(azure: Clients, sas: str, credential: Any = None) -> Iterator[BlobClient]:
    """The SDK's client for a SAS, without its own repetitions."""
    options: Any = {**azure.options, "retry_total": 0, "api_version": VERSION}
    with BlobClient.from_blob_url(sas, credential=credential, **options) as client:
        yield client


def listed(azure: Clients, sas: str, previous: str = "", **options: Any) -> list[tuple[int, int, bool]]:
    """All ranges of a page list or difference, in the order told: start, exclusive end, cleared."""
    found, marker = [], None
    with blob(azure, sas) as client:
        while True:
            body = page(client, previous, marker=marker, **options)
            found += ranges_of(body)
            if not (marker := body.next_marker):
                return found


def page(client: BlobClient, previous: str = "", **options: Any) -> Any:
    """One page of a list, as the SDK parsed it."""
    options = {name: value for name, value in options.items() if value is not None}
    kept: list[Any] = []

    def keep(response: Any, body: Any, headers: Any) -> Any:
        kept.append(body)
        return body

    with warnings.catch_warnings():  # what succeeds `get_page_ranges` keeps the pages to itself
        warnings.simplefilter("ignore", DeprecationWarning)
        if previous:
            client.get_page_range_diff_for_managed_disk(previous, cls=keep, **options)
        else:
            client.get_page_ranges(cls=keep, **options)
    return kept[0]


def ranges_of(body: Any) -> list[tuple[int, int, bool]]:
    """The ranges of a parsed list, written ones and cleared ones together, in order of their offsets."""
    written = [(each.start, each.end + 1, False) for each in body.page_range or ()]
    cleared = [(each.start, each.end + 1, True) for each in body.clear_range or ()]
    return sorted(written + cleared)


def vm_disk(sandbox: Sandbox, azure: Clients, name: str = "d", gib: int = 1) -> Inside:
    """An empty disk, to write through the sandbox."""
    return sandbox.disk(azure.disk(name, gib).id)
