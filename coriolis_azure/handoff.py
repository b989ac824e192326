"""Hands a replica over to other programs: writes what the VM was, and a domain of libvirt that boots its images.

    machine.json   the export info of the VM, with the `point` in time that it belongs to
    domain.xml     the domain, see `machine.libvirt`

Nothing relies on them, so a document that cannot be written is reported, and the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .errors import CoriolisAzureError
from .events import Notice, Report
from .machine import libvirt
from .machine.export_info import export_info
from .model import Json, Machine
from .replica.handed_off import DOMAIN, MACHINE, HandedOff

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write(place: object, machine: Machine, point: str, disks: Sequence[str], report: Report) -> None:
    """Write both documents for the `disks` of `machine` as of `point`, which the images at `place` show by now."""
    _write(place, {**export_info(machine), "point": point}, disks, report)


def pass_on(source: object, to: object, point: str, disks: Sequence[str], report: Report) -> None:
    """Write them for a replica that was restored from that of `source`, if those there are of that point."""
    info = _machine(source)
    if info is not None and info.get("point") == point:
        _write(to, info, disks, report)
    elif isinstance(to, HandedOff):
        why = "what the VM was is recorded only for the newest point in time"
        report(Notice(f"{MACHINE} and {DOMAIN} are left out: {why}"))


def _machine(place: object) -> Json | None:
    """What `machine.json` at a place says; None if there is none that can be read."""
    if not isinstance(place, HandedOff):
        return None
    try:
        found: Any = json.loads(place.document(MACHINE) or b"null")
    except (CoriolisAzureError, *_DAMAGED):
        return None
    return found if isinstance(found, dict) else None


def _write(place: object, info: Json, disks: Sequence[str], report: Report) -> None:
    if not isinstance(place, HandedOff):
        return

    _keep(place, MACHINE, lambda: (json.dumps(info, indent=1) + "\n").encode(), report)

    def domain() -> bytes | None:
        images = {disk: image for disk in disks if (image := place.image(disk)) is not None}
        return libvirt.domain(info, images, place.where) if images else None

    if _keep(place, DOMAIN, domain, report) and info["secure_boot"]:
        report(Notice(f"{DOMAIN} boots the VM with secure boot off; in Azure it is on"))


def _keep(place: HandedOff, name: str, text: Callable[[], bytes | None], report: Report) -> bool:
    """Write the document, unless there is none; whether it is written."""
    try:
        if (document := text()) is None:
            return False
        place.keep_document(name, document)
    except CoriolisAzureError as error:
        report(
            Notice(f"{name} is not written, and what is there may be of an earlier point: {error.message}")
        )
    except UnicodeEncodeError:
        report(
            Notice(f"{name} is not written: it cannot hold the name of this folder, which is not in UTF-8")
        )
    except (OSError, *_DAMAGED) as error:
        report(Notice(f"{name} is not written: {type(error).__name__}: {error}"))
    else:
        return True
    return False
