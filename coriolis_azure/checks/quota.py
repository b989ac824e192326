"""Reads what is left of the quotas of a location."""

from __future__ import annotations

from collections.abc import Callable, Generator

from ..model import Json, at
from .finding import Finding, ask

UNLIMITED = 1 << 60


def remaining(usages: Callable[[], list[Json]]) -> Generator[Finding, None, dict[str, int] | None]:
    """Return what is left of each quota, by lower-case name; None if that cannot be read."""
    listed = yield from ask("worker", usages, optional=True)
    if listed is None:
        return None
    return {
        str(at(usage, "name.value", "")).lower(): usage["limit"] - usage["currentValue"]
        for usage in listed
        # A negative limit means unlimited.
        if usage.get("limit", -1) >= 0 and "currentValue" in usage
    }
