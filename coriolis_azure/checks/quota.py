"""What the quotas of a location leave."""

from __future__ import annotations

from collections.abc import Callable, Generator

from ..model import Json, at
from .finding import Finding, ask

UNLIMITED = 1 << 60


def remaining(usages: Callable[[], list[Json]]) -> Generator[Finding, None, dict[str, int] | None]:
    """What the quota leaves, by lower-cased name."""
    listed = yield from ask("worker", usages, optional=True)
    if listed is None:
        return None
    return {
        str(at(usage, "name.value", "")).lower(): usage["limit"] - usage["currentValue"]
        for usage in listed
        # A negative limit is none.
        if usage.get("limit", -1) >= 0 and "currentValue" in usage
    }
