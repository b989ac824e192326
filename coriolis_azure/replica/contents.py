"""How much a replica holds, by its manifests; nothing is read of its images."""

from __future__ import annotations

from ..errors import InvalidInput, TransferError
from . import sets
from .destinations import Place
from .manifest import ZERO, Manifest


def data_bytes(place: Place, vm: str) -> dict[str, int]:
    """The bytes of each disk of the replica at `place` that are not zeros, by name; {} before the first run.

    A disk whose manifest cannot be used is left out. Raises InvalidInput if it is the replica of another VM than `vm`.
    """
    record = sets.read(place)
    if record is None:
        return {}
    if record.vm.lower() != vm.lower():
        raise InvalidInput(
            f"the destination holds the replica of another VM: {record.vm}",
            remedy="Give each VM a destination of its own.",
        )
    found = {}
    for name in record.point.roots if record.point is not None else ():
        disk = place.disk(name)
        with disk:
            try:
                found[name] = _data_bytes(disk.stored())
            except (InvalidInput, TransferError):
                continue
    return found


def _data_bytes(manifest: Manifest) -> int:
    return sum(manifest.span(index)[1] for index in range(manifest.count) if manifest.digest(index) != ZERO)
