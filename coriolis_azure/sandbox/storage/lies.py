"""Wrong answers of a disk's host or a storage account. A lie is made of a right answer: nothing else here knows of it.

Each is one that a reader has to notice: a client, a proxy or an emulator that loses a header, a marker or a range has
been seen, or could be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from coriolis_azure.sandbox.storage.access import BlobError
from coriolis_azure.sandbox.storage.page_lists import PREVIOUS
from coriolis_azure.sandbox.wire import Request, Response

Next = Callable[[Request], Response]
Lie = Callable[[Request, Next], Response]
Row = tuple[str, int, int]  # PageRange or ClearRange, start, inclusive end

_LENGTH = "x-ms-blob-content-length"
_ROW = re.compile(r"<(PageRange|ClearRange)><Start>(\d+)</Start><End>(\d+)</End></\1>")
_LIST = re.compile(r"<PageList( />|>.*</PageList>)")
_MARKER = re.compile(r"<NextMarker>.*</NextMarker>")
_PAGE = 512


def without(header: str, parameter: str = "") -> Lie:
    """A host that ignores a header, or a parameter of a query."""

    def answered(request: Request, answer: Next) -> Response:
        kept = {name: value for name, value in request.headers.items() if name.lower() != header}
        url = re.sub(rf"&{parameter}=[^&]*", "", request.url) if parameter else request.url
        return answer(replace(request, url=url, headers=kept))

    return answered


def relisted(
    change: Callable[[list[Row], int], list[Row]], *, cut: bool = False
) -> Callable[[Request, Next], Response]:
    """A host whose lists are changed; `change` gets the ranges and the blob's size. `cut`: it tells no marker."""

    def answered(request: Request, answer: Next) -> Response:
        response = answer(request)
        text = response.body.decode()
        if response.status != 200 or not _LIST.search(text):
            return response
        rows = [(kind, int(start), int(end)) for kind, start, end in _ROW.findall(text)]
        marker = "" if cut else "".join(_MARKER.findall(text))
        told = "".join(
            f"<{kind}><Start>{start}</Start><End>{end}</End></{kind}>"
            for kind, start, end in change(rows, int(response.headers[_LENGTH]))
        )
        listing = f"<PageList>{told}{marker}</PageList>" if told or marker else "<PageList />"
        return replace(response, body=_LIST.sub(listing, text).encode())

    return answered


def _half(rows: list[Row], size: int) -> list[Row]:
    del size
    return rows[: len(rows) // 2]


def _one_left_out(rows: list[Row], size: int) -> list[Row]:
    """Without the middle one of the ranges of the content."""
    of_content = [row for row in rows if row[1] < size - _PAGE]
    return [row for row in rows if row != of_content[len(of_content) // 2]] if of_content else rows


def _unsorted(rows: list[Row], size: int) -> list[Row]:
    """In reverse; a single range in two halves."""
    del size
    if len(rows) == 1:
        ((kind, start, end),) = rows
        middle = start + (end + 1 - start) // _PAGE // 2 * _PAGE
        rows = [(kind, start, middle - 1), (kind, middle, end)] if middle > start else rows
    return rows[::-1]


def _overlapping(rows: list[Row], size: int) -> list[Row]:
    del size
    return [*rows[:1], *rows]


def _beyond_end(rows: list[Row], size: int) -> list[Row]:
    return [*rows, ("PageRange", size, size + _PAGE - 1)]


def _unaligned(rows: list[Row], size: int) -> list[Row]:
    del size
    return [(kind, start + 1, end) for kind, start, end in rows]


def _with_footer(rows: list[Row], size: int) -> list[Row]:
    return rows if rows and rows[-1][2] == size - 1 else [*rows, ("PageRange", size - _PAGE, size - 1)]


def _wrong_length(request: Request, answer: Next) -> Response:
    """A host that does not count the footer."""
    response = answer(request)
    headers = dict(response.headers)
    if request.method == "HEAD" and response.status == 200:
        headers["Content-Length"] = str(int(headers["Content-Length"]) - _PAGE)
    if _LENGTH in headers:
        headers[_LENGTH] = str(int(headers[_LENGTH]) - _PAGE)
    if "Content-Range" in headers:
        span, _, size = headers["Content-Range"].partition("/")
        headers["Content-Range"] = f"{span}/{int(size) - _PAGE}"
    return replace(response, headers=headers)


def _wrong_version(request: Request, answer: Next) -> Response:
    response = answer(request)
    return replace(response, headers={**response.headers, "x-ms-version": "2018-11-09"})


def _broken(request: Request, answer: Next) -> Response:
    """A body that ends half-way."""
    response = answer(request)
    headers = {name: value for name, value in response.headers.items() if name != "Transfer-Encoding"}
    headers["Content-Length"] = str(len(response.body))
    return replace(response, headers=headers, body=response.body[: len(response.body) // 2])


LIES: dict[str, Lie] = {
    "header-ignored": without(PREVIOUS, "prevsnapshot"),
    "window-ignored": without("x-ms-range"),
    "list-cut": relisted(_half, cut=True),
    "range-left-out": relisted(_one_left_out),
    "ranges-unsorted": relisted(_unsorted),
    "ranges-overlapping": relisted(_overlapping),
    "ranges-beyond-end": relisted(_beyond_end),
    "ranges-unaligned": relisted(_unaligned),
    "footer-counted": relisted(_with_footer),
    "wrong-length": _wrong_length,
    "wrong-version": _wrong_version,
    "broken-body": _broken,
}


def too_long(request: Request, answer: Next, most: int) -> Response:
    """The answer of a host that cannot list more than `most` ranges in time."""
    # All pages of a list take as long as the window has ranges.
    url = re.sub(r"&(maxresults|marker)=[^&]*", "", request.url)
    if len(_ROW.findall(answer(replace(request, url=url)).body.decode())) <= most:
        return answer(request)
    return refused(
        500, "OperationTimedOut", "The operation could not be completed within the permitted time."
    )


def refused(status: int, code: str, message: str) -> Response:
    """A refusal in the blob service's words."""
    return BlobError(status, code, message).response()
