"""Clocks that stand still until somebody waits."""

from __future__ import annotations

from coriolis_azure.clock import Clock


class Held(Clock):
    """A clock that waits for nothing."""

    def __init__(self, pace: float = 1) -> None:
        self.moment, self.pace = 0.0, pace

    def monotonic(self) -> float:
        return self.moment

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.moment += seconds * self.pace
