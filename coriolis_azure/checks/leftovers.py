"""What other runs have in the resource group."""

from __future__ import annotations

from collections.abc import Iterator

from ..events import counted
from ..run import cleanup
from .finding import Finding, ask, fine
from .subject import Subject


def leftovers(subject: Subject) -> Iterator[Finding]:
    """What other runs have in the group."""
    found = yield from ask("clean up", lambda: cleanup.leftovers(subject.context))
    if found:
        runs = ", ".join(leftover.run for leftover in found)
        yield fine(
            "clean up",
            f"resources of {counted(len(found), 'other run')} are there ({runs}): of runs under way, or dead ones that "
            "the next run removes",
        )
