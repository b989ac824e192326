"""Finds runs of a VM whose process died while it deployed or deleted them: they no longer show signs of life."""

from __future__ import annotations

from datetime import datetime

from ..azure.context import Context
from ..events import Waiting
from . import cleanup

# During a deployment, a run shows a sign of life every 30 seconds.
STALLED_SECONDS = 100.0


class Watch:
    """Watches the unfinished runs of a VM, from the moment it is created."""

    def __init__(self, context: Context, vm: str) -> None:
        self._context, self._vm = context, vm
        self._first = self._signs()
        self._since = context.clock.monotonic()

    def stalled(self) -> list[str]:
        """The ids of those that have shown no sign of life for `STALLED_SECONDS`, after waiting that long."""
        if not self._first:
            return []
        clock = self._context.clock
        rest = self._since + STALLED_SECONDS - clock.monotonic()
        if rest > 0:
            self._context.report(Waiting(f"a sign of life of an unfinished run for {self._vm}", rest))
            clock.sleep(rest)
        now = self._signs()
        return [run for run, sign in self._first.items() if now.get(run) == sign]

    def _signs(self) -> dict[str, datetime | None]:
        """The last sign of life of each unfinished run."""
        return cleanup.unfinished(self._context.azure, self._context.environment.resource_group, self._vm)
