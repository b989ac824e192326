"""Opens the place that a destination's URL names: a folder, or a prefix in a container of Blob storage."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, unquote_to_bytes

from ..errors import CoriolisAzureError, InvalidInput
from ..events import Report
from . import nbd_url
from .folder import ImageFolder
from .nbd_folder import NbdFolder

if TYPE_CHECKING:
    from ..azure.blobs import Storage
from .destinations import Place

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ("file://", "blob://", "nbd://")
_ELSEWHERE = re.compile(r"[^/]+:")  # what rsync, scp and others would read as a host, a drive or a service
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[^/\\\x00-\x1f\x7f]*[^/\\\x00-\x1f\x7f.]")


def is_in_azure(url: str) -> bool:
    """Whether opening the place needs access to Blob storage."""
    scheme = _SCHEME.match(url)
    return scheme is not None and scheme[1].lower() == "blob"


def open(
    url: str,
    report: Report,
    storage: Storage | None = None,
    *,
    existing: bool = False,
    adopt: bool = False,
    vm: str = "",
) -> Place:
    """Open the place that `url` names: the path or file:// URL of a folder, blob://account/container/prefix, or nbd://.

    `storage` gives access to Blob storage. A missing folder or container is created, unless the place must be
    `existing`: then nothing is changed there, except that a switch which a dead run has begun is completed. `adopt`:
    take over images that no run has made. `vm`: the name of the VM, which may be part of the names of exports.

    Raises InvalidInput if `url` names no such place, or one that cannot be used or is in use by another run.
    """
    place = _opened(url, report, storage, existing=existing, adopt=adopt, vm=vm)
    try:
        if not existing or not place.unpublished():
            return place
    except BaseException:
        place.close()
        raise
    place.close()
    with contextlib.suppress(
        CoriolisAzureError
    ):  # a read-only place: its reader reports the unfinished switch
        _opened(url, report, storage).close()
    return _opened(url, report, storage, existing=True)


def _opened(
    url: str,
    report: Report,
    storage: Storage | None,
    *,
    existing: bool = False,
    adopt: bool = False,
    vm: str = "",
) -> Place:
    if nbd_url.is_nbd(url):
        return NbdFolder(nbd_url.Exports.of(url), report, existing=existing, adopt=adopt, vm=vm)
    if not is_in_azure(url):
        return ImageFolder(folder(url), report, existing=existing, adopt=adopt)
    if adopt:
        raise InvalidInput(
            "a VHD in Blob storage that no run has made cannot be adopted",
            remedy="Give another prefix, or the path of a folder.",
        )
    account, container, prefix = in_storage(url)
    from .container import BlobFolder  # only if needed: the SDK takes time and memory

    return BlobFolder(required(storage, url), account, container, prefix, report, existing=existing)


def folder(url: str) -> Path:
    """The folder of this host that `url` names: a path, or a file:// URL; for exports, that of their state.

    Raises InvalidInput if it names none.
    """
    if nbd_url.is_nbd(url):
        return nbd_url.Exports.of(url).state
    scheme = _SCHEME.match(url)
    if scheme is not None:
        if scheme[1].lower() != "file":
            raise InvalidInput(
                f"{scheme[0]} is not a kind of destination",
                remedy=f"Give the path of a folder, or a URL that begins with {', '.join(_SCHEMES)}.",
            )
        return _local(url)
    if not url:
        raise InvalidInput("the destination is empty", remedy="Give the path of a folder.")
    if _ELSEWHERE.match(url):
        raise InvalidInput(
            f"{url} is not a folder of this host",
            remedy="Mount the place and give its path, or give a URL that begins with "
            f"{' or '.join(_SCHEMES)}. For a folder of this name, write ./{url}",
        )
    return Path(url)


def _local(url: str) -> Path:
    """The path in a file:// URL."""
    host, slash, path = url.partition("://")[2].partition("/")
    name = os.fsdecode(unquote_to_bytes(path))
    if host not in ("", "localhost") or not slash or re.search("[?#]", path) or "\0" in name:
        raise InvalidInput(
            f"{url} does not name a folder of this host", remedy="Write it as file:///path/of/folder."
        )
    return Path("/", name)


def below(url: str, vm: str) -> str:
    """The place of this VM at a destination of several. Raises InvalidInput if they would share one."""
    if nbd_url.is_nbd(url):
        return nbd_url.Exports.of(url).below(vm).url
    return f"{url.rstrip('/')}/{quote(vm) if is_in_azure(url) else vm}"


def required(storage: Storage | None, url: str) -> Storage:
    """The storage that `url` needs. Raises InvalidInput if there is none."""
    if storage is None:
        raise InvalidInput(
            f"{url} is in Azure", remedy="Give the connection and the source environment (-c, -e) too."
        )
    return storage


def in_storage(url: str) -> tuple[str, str, str]:
    """The account, the container and the prefix in a blob:// URL. Raises InvalidInput if one of them is not valid."""
    remedy = "Write it as blob://account/container/prefix."
    account, _, rest = url.partition("://")[2].partition("/")
    container, _, prefix = unquote(rest).partition("/")
    prefix = prefix.rstrip("/")
    if not _ACCOUNT.fullmatch(account):
        raise InvalidInput(
            f"{url}: {account!r} is not a valid name of a storage account",
            remedy=f"{remedy} The account has 3 to 24 lower-case letters and digits.",
        )
    if not _CONTAINER.fullmatch(container):
        raise InvalidInput(
            f"{url}: {container!r} is not a valid name of a container",
            remedy=f"{remedy} The container has 3 to 63 lower-case letters, digits and single hyphens, and begins and "
            "ends with a letter or digit.",
        )
    if prefix and (len(prefix) > 900 or not all(map(_SEGMENT.fullmatch, prefix.split("/")))):
        raise InvalidInput(
            f"{url}: {prefix!r} is not a valid prefix of blob names",
            remedy=f"{remedy} No part of the prefix may be empty, end with a dot, or hold a backslash.",
        )
    return account, container, prefix
