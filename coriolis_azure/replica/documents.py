"""Reads and replaces the two documents beside an image: the manifest and the draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..clock import Clock, rfc3339
from ..errors import DestinationFailed, InvalidInput, exhausted_remedy
from ..events import Notice, Report
from ..model import Json
from .digests import Digests
from .manifest import UNKNOWN, Manifest
from .medium import Document, Medium, Past, Stamp

_DAMAGED = (ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class Saved:
    """The document `manifest`: the manifest of the image, the image's stamp, and the baseline left with it."""

    manifest: Manifest
    stamp: Stamp
    baseline: Json | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a run began to write the image in place and did not succeed."""
        return self.manifest.digests == Digests.filled(UNKNOWN, self.manifest.count)


@dataclass(frozen=True)
class SavedDraft:
    """The document `draft`: which disk the draft is of. Digests and baseline count only once it is committed."""

    manifest: Manifest
    partial: bool
    committed: bool = False
    baseline: Json | None = None


class Documents:
    """The documents of one medium. A damaged one is reported, and counts as missing.

    One that cannot be read now is not damaged: then DestinationFailed is raised.
    """

    def __init__(self, medium: Medium, report: Report) -> None:
        self._medium, self._report = medium, report

    def manifest(self, *, ours: bool = True) -> Saved | None:
        """The document `manifest`; None if there is none. `ours`: see Medium.load."""
        found = self._read("manifest", ours=ours)
        if found is None:
            return None
        manifest, beside = found
        stamp = beside.get("image")
        if isinstance(stamp, str):  # from older versions, in Blob storage
            stamp = {"image": stamp}
        if not isinstance(stamp, dict):
            self._report(Notice(f"{self._medium.where}.manifest is damaged, and is not used"))
            return None
        return Saved(manifest, stamp, _baseline(beside))

    def save_manifest(self, saved: Saved) -> None:
        """Replace the document `manifest`. The time is for people who look at one disk: no run uses it."""
        beside: Json = {"image": saved.stamp, "written": rfc3339(Clock().now())}
        if saved.baseline:
            beside["baseline"] = saved.baseline
        self._medium.save("manifest", saved.manifest.text(beside))

    def draft(self, *, ours: bool = True) -> SavedDraft | None:
        """The document `draft`; None if there is none. `ours`: see Medium.load."""
        found = self._read("draft", ours=ours)
        if found is None:
            return None
        manifest, beside = found
        return SavedDraft(
            manifest, beside.get("partial") is True, beside.get("committed") is True, _baseline(beside)
        )

    def save_draft(self, draft: SavedDraft) -> None:
        """Replace the document `draft`."""
        beside: Json = {"partial": draft.partial}
        if draft.committed:
            beside |= {"committed": True, "baseline": draft.baseline}
        self._medium.save("draft", draft.manifest.text(beside))

    def manifest_at(self, point: str, past: Past) -> Manifest | None:
        """The manifest of the earlier point `point`; None if the disk did not change before the next newer point.

        Raises InvalidInput if it is damaged.
        """
        file = past.load()
        if file is None:
            return None
        what = f"the manifest of {self._medium.where} that was kept at the point {point}"
        try:
            with file:
                return Manifest.read(file)[0]
        except (InvalidInput, *_DAMAGED) as error:
            why = (
                f"is not used: {error.message}"
                if isinstance(error, InvalidInput)
                else "was cut off or damaged"
            )
            raise InvalidInput(
                f"{what} {why}", remedy="Choose another point: `coriolis-azure status` lists them."
            ) from error
        except OSError as error:
            raise self._unreadable(what, error) from error

    def _read(self, document: Document, *, ours: bool) -> tuple[Manifest, dict[str, Any]] | None:
        """A document's manifest, and all other keys; None if there is none or it is damaged."""
        file = self._medium.load(document, ours=ours)
        if file is None:
            return None
        try:
            with file:
                return Manifest.read(file)
        except InvalidInput as error:
            why = f"is not used: {error.message}"
        except _DAMAGED:
            why = "was cut off or damaged, and is not used"
        except OSError as error:
            raise self._unreadable(f"{self._medium.where}.{document}", error) from error
        self._report(Notice(f"{self._medium.where}.{document} {why}"))
        return None

    def _unreadable(self, what: str, error: OSError) -> DestinationFailed:
        return DestinationFailed(
            f"{what} cannot be read: {error.strerror}",
            remedy=exhausted_remedy(error),
            disk=self._medium.name,
        )


def _baseline(beside: Json) -> Json | None:
    baseline = beside.get("baseline")
    return baseline if isinstance(baseline, dict) else None
