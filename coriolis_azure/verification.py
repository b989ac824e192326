"""A destination, read again and compared with its own manifests. Nothing of it is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from . import transfer
from .clock import Clock
from .destinations import Kept, Place
from .errors import DestinationFailed, InvalidInput
from .events import Report, Step
from .hashing import UNKNOWN, Manifest
from .model import Json


@dataclass(frozen=True)
class Verdict:
    """What was found of one disk.

    `verified`: True where all of it is as the manifest says; False where something is not, at `bad_offset` first;
    None where that cannot be told, with the `reason`. `unknown_bytes`: what an interrupted run was writing.
    """

    name: str
    verified: bool | None
    size_bytes: int | None = None
    root: str | None = None
    bad_offset: int | None = None
    unknown_bytes: int = 0
    reason: str = ""

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def verify(place: Place, report: Report, clock: Clock) -> list[Verdict]:
    """Read every disk at `place` as a whole; InvalidInput when there is none."""
    names = place.names()
    if not names:
        raise InvalidInput("there is no replica at this destination", remedy="Replicate a VM to it first.")
    return [_verdict(name, place.disk(name), report, clock) for name in names]


def _verdict(name: str, kept: Kept, report: Report, clock: Clock) -> Verdict:
    report(Step("verify", name))
    with kept:
        try:
            manifest = kept.stored()
        except InvalidInput as error:
            return Verdict(name, None, reason=error.message)
        except DestinationFailed as error:
            return Verdict(name, False, bad_offset=error.facts.get("offset"), reason=error.message)
        found = Verdict(name, True, manifest.size, manifest.root())
        unknown = sum(manifest.span(i)[1] for i in range(manifest.count) if manifest.digest(i) == UNKNOWN)
        bad, reason = _first_bad(kept, manifest, name, report, clock)
    if reason:
        return Verdict(name, False, found.size_bytes, found.root, bad, unknown, reason)
    if unknown:
        reason = "the last run did not end well, and what it was writing is not known"
        return Verdict(name, None, found.size_bytes, None, None, unknown, reason)
    return found


def _first_bad(
    kept: Kept, manifest: Manifest, name: str, report: Report, clock: Clock
) -> tuple[int | None, str]:
    """Offset of the first chunk that is not as the manifest says, and the reason; ("", None) when all are."""
    progress = transfer.Progress(name, manifest.size, report, clock)

    def known() -> Iterator[int]:
        for index in range(manifest.count):
            if manifest.digest(index) != UNKNOWN:
                progress.show(manifest.span(index)[0], 0)
                yield index

    try:
        for index in transfer.differing(kept, manifest, known()):
            offset = manifest.span(index)[0]
            return offset, f"the chunk at offset {offset} is not what was replicated"
    except DestinationFailed as error:
        return error.facts.get("offset"), error.message
    progress.last(0)
    return None, ""
