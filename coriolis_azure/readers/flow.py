"""The flow of one disk's data: its rate limit and its bottleneck."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..clock import Clock
from ..events import Report, Waiting
from ..threads import every
from .channel import SILENCE_SECONDS
from .rate_limiter import RateLimiter

_BOTTLENECK_SECONDS = 1.0  # the least time that a bottleneck is judged by
_QUIET_SECONDS = 10.0  # after so long without progress, report what the transfer is waiting for
_UNLIMITED = 1 << 30


class Flow:
    """Limits the rate of the data of `disk` and measures where the time goes.

    One thread records what it does; any thread may ask for the `bottleneck`. Without a lock, because each chunk would
    take it several times: an addition that `bottleneck` overwrites is lost, which only blurs the estimate.
    """

    def __init__(self, disk: str, report: Report, clock: Clock, limiter: RateLimiter | None = None) -> None:
        self.disk, self.report, self.clock, self._limiter = disk, report, clock, limiter
        self.slice = limiter.slice if limiter is not None else _UNLIMITED  # bytes to take at a time
        self._spent = dict.fromkeys(("source", "destination", "limit"), 0.0)  # recent seconds
        self._bottleneck = ""
        self._moved, self._waiting = clock.monotonic(), True

    def received(self, begun: float, size: int) -> None:
        """Record `size` bytes that were awaited since `begun`; wait until they are within the rate limit."""
        self._moved = self.clock.monotonic()
        self._spent["source"] += self._moved - begun
        if self._limiter is not None:
            self._limiter.spent(size)
            self._spent["limit"] += self.clock.monotonic() - self._moved

    @contextmanager
    def passing(self) -> Iterator[None]:
        """While the block runs, a chunk is being passed on: its time is the destination's."""
        self._waiting, begun = False, self.clock.monotonic()
        yield
        self._moved, self._waiting = self.clock.monotonic(), True
        self._spent["destination"] += self._moved - begun

    def bottleneck(self) -> str:
        """What most of the last second or more was spent on: see `events.Copied`."""
        whole = sum(self._spent.values())
        if whole >= _BOTTLENECK_SECONDS:
            slowest = max(self._spent, key=lambda part: self._spent[part])
            self._bottleneck = slowest if self._spent[slowest] > whole / 2 else ""
            self._spent = dict.fromkeys(self._spent, 0.0)
        return self._bottleneck

    @contextmanager
    def watched(self, source: str) -> Iterator[None]:
        """While the block runs, report what the transfer waits for whenever nothing moves.

        `source` describes the wait for the source.
        """

        def report_stall() -> None:
            quiet = self.clock.monotonic() - self._moved
            if quiet >= _QUIET_SECONDS:
                awaited = source if self._waiting else "the destination"
                self.report(
                    Waiting(f"{self.disk}: {awaited}, for {quiet:.0f} s now", SILENCE_SECONDS - quiet)
                )

        self._moved = self.clock.monotonic()
        with every(_QUIET_SECONDS / 2, report_stall, optional=True):
            yield
