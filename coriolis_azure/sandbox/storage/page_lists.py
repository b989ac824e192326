"""The page lists of exported disks: what is allocated, or what changed since an older snapshot of the family.

Answers are in pages, in windows, with PageRange and ClearRange mixed in order of their offsets, as Azure sends them.
The footer is a page of the blob: it is allocated, and changes only if the disk grew.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator

from coriolis_azure.sandbox.compute import differences, exports
from coriolis_azure.sandbox.pages import PAGE, Range, merged
from coriolis_azure.sandbox.storage.access import BlobError
from coriolis_azure.sandbox.storage.exported import Asked, Exported, failed, located, opened
from coriolis_azure.sandbox.wire import Request, Response

PREVIOUS = "x-ms-previous-snapshot-url"
# The service versions that know the header, and pages of a list. Older ones ignore them.
_KNOWS_PREVIOUS, _KNOWS_PAGES = "2019-07-07", "2020-10-02"
_SPLIT = 4 << 40  # a disk that grew across this size has no differences to snapshots from before


def answer(asked: Asked) -> Response:
    """Answer `comp=pagelist`."""
    start, end = _window(asked)
    previous = _previous(asked)
    most, marker = _page(asked)
    ranges = _ranges(asked, previous, max(start, marker), end)
    page = list(itertools.islice(ranges, most))
    following = next(ranges, None)
    body = _xml(page, following.start if following else None)
    headers = {
        **asked.blob.stamps,
        "Content-Type": "application/xml",
        "Transfer-Encoding": "chunked",
        "x-ms-blob-content-length": str(asked.blob.size),
    }
    return Response(200, headers, body)


def _window(asked: Asked) -> tuple[int, int]:
    """The part of the blob that is listed: pages, and not beyond its end."""
    start, end = asked.range() or (0, asked.blob.size)
    if start % PAGE or end % PAGE:
        raise BlobError(416, "InvalidPageRange", "The page range specified is invalid.")
    return start, end


def _page(asked: Asked) -> tuple[int, int]:
    """How many ranges are listed at most, and where the page begins."""
    most, query = asked.world.page_ranges, asked.request.query
    if asked.header("x-ms-version") < _KNOWS_PAGES:
        return most, 0
    wanted = query.get("maxresults", "")
    if wanted and not (wanted.isdecimal() and int(wanted)):
        raise BlobError(
            400,
            "OutOfRangeQueryParameterValue",
            "One of the query parameters specified in the request URI is outside the permissible range.",
        )
    try:
        marker = int(base64.b64decode(query.get("marker", ""), validate=True) or 0)
    except ValueError:
        raise _invalid_query() from None
    return min(most, int(wanted or most)), marker


def _previous(asked: Asked) -> Exported | None:
    """The older snapshot to compare with; None if everything allocated is listed."""
    if "prevsnapshot" in asked.request.query:
        raise _invalid_query()
    sas = asked.header(PREVIOUS)
    if not sas or asked.header("x-ms-version") < _KNOWS_PREVIOUS:
        return None
    older = _located(asked, Request("GET", sas))
    _check_comparable(asked.blob, older)
    return older


def _located(asked: Asked, older: Request) -> Exported:
    """The older snapshot, if its SAS is valid."""
    world = asked.world
    found = located(world, older.path, older.query)
    if found is not None and exports.signed(world, found, older.query):
        return opened(world, found)
    host, container, _ = exports.place(asked.blob.resource)
    if found is None and older.path == f"/{host}/{container}/{exports.BLOB}" and older.query.get("snapshot"):
        raise BlobError(409, "PreviousSnapshotNotFound", "The previous snapshot is not found.")
    raise failed()


def _check_comparable(newer: Exported, older: Exported) -> None:
    families = {exports.family_of(each.resource) for each in (newer, older)}
    if len(families) > 1 or "" in families:
        raise BlobError(
            409,
            "PreviousSnapshotOperationNotSupported",
            "Differential Get Page Ranges is not supported on the previous snapshot.",
        )
    if older.resource.hidden["generation"] > newer.resource.hidden["generation"]:
        raise BlobError(
            400,
            "PreviousSnapshotCannotBeNewer",
            "The prevsnapshot query parameter value cannot be newer than snapshot query parameter value.",
        )
    if older.content <= _SPLIT < newer.content:
        raise BlobError(
            409, "BlobOverwritten", "The blob has been recreated since the previous snapshot was taken."
        )


def _ranges(asked: Asked, previous: Exported | None, start: int, end: int) -> Iterator[Range]:
    contents, blob = asked.world.contents, asked.blob
    last = min(end, blob.content)
    if previous is None:
        listed = differences.allocated(contents, blob.resource, start, last)
    else:
        listed = differences.changed(contents, blob.resource, previous.resource, start, last)
    new_footer = previous is None or previous.content != blob.content
    footer = [Range(max(start, blob.content), end)] if new_footer and start < end > blob.content else []
    return merged(itertools.chain(listed, footer))


def _xml(ranges: list[Range], following: int | None) -> bytes:
    rows = "".join(
        f"<{name}><Start>{start}</Start><End>{end - 1}</End></{name}>"
        for start, end, cleared in ranges
        for name in ["ClearRange" if cleared else "PageRange"]
    )
    marker = "" if following is None else base64.b64encode(str(following).encode()).decode()
    rows += f"<NextMarker>{marker}</NextMarker>" if marker else ""
    listing = f"<PageList>{rows}</PageList>" if rows else "<PageList />"
    return f'\ufeff<?xml version="1.0" encoding="utf-8"?>{listing}'.encode()


def _invalid_query() -> BlobError:
    return BlobError(
        400,
        "InvalidQueryParameterValue",
        "Value for one of the query parameters specified in the request URI is invalid.",
    )
