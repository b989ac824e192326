"""The documents beside a replica that are meant for other programs, and where those find its images.

No run relies on them. Each is replaced once the images show a new point in time.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ..model import Image

MACHINE, DOMAIN = "machine.json", "domain.xml"
NAMES = (MACHINE, DOMAIN)


@runtime_checkable
class HandedOff(Protocol):
    """A place with documents for other programs. Failures are raised as CoriolisAzureErrors."""

    @property
    def where(self) -> str:
        """The place itself: an absolute path, or a URL."""

    def image(self, disk: str) -> Image | None:
        """Where the image of the disk is, for other programs; None if it is no file that they could open."""

    def document(self, name: str) -> bytes | None:
        """The document of this name; None if there is none."""

    def keep_document(self, name: str, text: bytes) -> None:
        """Replace the document atomically. Only while a run holds the place."""
