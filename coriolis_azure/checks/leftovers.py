"""Looks for resources of other runs in the resource group."""

from __future__ import annotations

from collections.abc import Iterator

from ..events import counted
from ..run import cleanup
from .finding import Finding, ask, fine
from .subject import Subject


def leftovers(subject: Subject) -> Iterator[Finding]:
    """Report the resources of other runs in the resource group."""
    others = yield from ask("clean up", lambda: cleanup.leftovers(subject.context))
    if others:
        runs = ", ".join(leftover.run for leftover in others)
        yield fine(
            "clean up",
            f"there are resources of {counted(len(others), 'other run')} ({runs}): of active runs, or of dead ones "
            "that the next run cleans up",
        )
