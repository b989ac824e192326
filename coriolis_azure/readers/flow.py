"""The flow of one disk's data: its rate limit, and what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..clock import Clock
from ..events import Report, Waiting
from ..threads import every
from .channel import SILENCE_SECONDS
from .rate_limiter import RateLimiter

_LATE_SECONDS = 1.0
_QUIET_SECONDS = 10.0  # without anything happening, after which a watcher is told what is waited for
_UNLIMITED = 1 << 30


class Flow:
    """Limits the rate at which the data of `disk` comes, and knows what most of the time is spent on.

    One thread reports what it does here; any thread may ask for the `bottleneck`.
    """

    def __init__(self, disk: str, report: Report, clock: Clock, limiter: RateLimiter | None = None) -> None:
        self.disk, self.report, self.clock, self._limiter = disk, report, clock, limiter
        self.slice = limiter.slice if limiter is not None else _UNLIMITED  # bytes to take at a time
        self._spent = dict.fromkeys(("source", "destination", "limit"), 0.0)  # seconds as of late
        self._bottleneck = ""
        self._moved, self._waiting = clock.monotonic(), True

    def received(self, begun: float, size: int) -> None:
        """`size` bytes were waited for since `begun`; waits until they are within the rate."""
        self._moved = self.clock.monotonic()
        self._spent["source"] += self._moved - begun
        if self._limiter is not None:
            self._limiter.spent(size)
            self._spent["limit"] += self.clock.monotonic() - self._moved

    @contextmanager
    def passing(self) -> Iterator[None]:
        """While the block runs, a chunk is passed on, and what is waited for is the destination."""
        self._waiting, begun = False, self.clock.monotonic()
        yield
        self._moved, self._waiting = self.clock.monotonic(), True
        self._spent["destination"] += self._moved - begun

    def bottleneck(self) -> str:
        """What most of the last second or more was spent on: see `events.Copied`."""
        whole = sum(self._spent.values())
        if whole >= _LATE_SECONDS:
            most = max(self._spent, key=lambda what: self._spent[what])
            self._bottleneck = most if self._spent[most] > whole / 2 else ""
            self._spent = dict.fromkeys(self._spent, 0.0)
        return self._bottleneck

    @contextmanager
    def watched(self, source: str) -> Iterator[None]:
        """While the block runs, a watcher is told what is waited for where nothing moves; `source` names the source."""

        def tell() -> None:
            quiet = self.clock.monotonic() - self._moved
            if quiet >= _QUIET_SECONDS:
                who = source if self._waiting else "the destination"
                self.report(Waiting(f"{self.disk}: {who}, for {quiet:.0f} s now", SILENCE_SECONDS - quiet))

        self._moved = self.clock.monotonic()
        with every(_QUIET_SECONDS / 2, tell, optional=True):
            yield
