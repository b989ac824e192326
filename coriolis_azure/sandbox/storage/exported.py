"""Disks and snapshots as the page blobs that their SAS name, and requests for them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import format_datetime, parsedate_to_datetime

from coriolis_azure import vhd
from coriolis_azure.sandbox.compute import exports
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.access import BlobError
from coriolis_azure.sandbox.wire import Request
from coriolis_azure.sandbox.world import World

_FOOTER_MADE = datetime(2020, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Exported:
    """A disk or snapshot as a fixed VHD in a page blob: its `content` bytes, then a footer."""

    resource: Resource
    content: int
    modified: datetime
    etag: str

    @property
    def size(self) -> int:
        """The size of the blob."""
        return self.content + vhd.FOOTER

    @property
    def stamps(self) -> dict[str, str]:
        """The headers that tell one state of a blob from another."""
        return {"ETag": self.etag, "Last-Modified": format_datetime(self.modified, usegmt=True)}

    @property
    def footer(self) -> bytes:
        """What follows the content, the same for all of a family."""
        host, _, _ = exports.place(self.resource)
        return vhd.footer(self.content, uuid.uuid5(uuid.NAMESPACE_DNS, host), _FOOTER_MADE)


@dataclass(frozen=True)
class Asked:
    """An authorized request for a blob."""

    world: World
    request: Request
    blob: Exported

    def header(self, name: str) -> str:
        """The value of a header; "" if absent."""
        return self.request.header(name) or ""

    def range(self) -> tuple[int, int] | None:
        """The range asked for, with its end exclusive; None for all."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.header("x-ms-range") or self.header("Range"))
        if span is None:
            return None
        if int(span[1]) >= self.blob.size:
            raise invalid_range()
        return int(span[1]), min(int(span[2] or self.blob.size) + 1, self.blob.size)


def located(world: World, path: str, query: Mapping[str, str]) -> Resource | None:
    """The disk or snapshot at the path and snapshot of a SAS, whether or not that is valid."""
    host, container, name = [*path.strip("/").split("/"), "", ""][:3]
    place = (host, container, query.get("snapshot", ""))
    if name != exports.BLOB:
        return None
    return next((found for found in exports.exportable(world) if exports.place(found) == place), None)


def opened(world: World, resource: Resource) -> Exported:
    """A disk or snapshot as a blob."""
    made = datetime.fromisoformat(resource.properties["timeCreated"])
    content = world.contents.size(resource.hidden["content"])
    return Exported(
        resource, content, made.replace(microsecond=0), f'"0x{int(made.timestamp() * 10**6) * 10:X}"'
    )


def check_conditions(asked: Asked) -> None:
    """Check the conditional headers: 304 for those of a cache, 412 for the others."""
    match, none = asked.header("If-Match"), asked.header("If-None-Match")
    newer, older = (_moment(asked.header(f"If-{word}-Since")) for word in ("Modified", "Unmodified"))
    etag, modified = asked.blob.etag, asked.blob.modified
    if (match and match not in {"*", etag}) or (older and modified > older):
        raise _not_met(412)
    if (none and none in {"*", etag}) or (newer and modified <= newer):
        raise _not_met(304)


def _moment(text: str) -> datetime | None:
    return parsedate_to_datetime(text) if text else None


def _not_met(status: int) -> BlobError:
    return BlobError(
        status, "ConditionNotMet", "The condition specified using HTTP conditional header(s) is not met."
    )


def failed() -> BlobError:
    """403 AuthenticationFailed."""
    return BlobError(
        403,
        "AuthenticationFailed",
        "Server failed to authenticate the request. Make sure the value of Authorization header is formed correctly "
        "including the signature.",
    )


def invalid_range() -> BlobError:
    """416 InvalidRange."""
    return BlobError(
        416, "InvalidRange", "The range specified is invalid for the current size of the resource."
    )
