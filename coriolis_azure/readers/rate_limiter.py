"""The bandwidth limit of a run, shared by all its disks."""

from __future__ import annotations

from ..agent import wire
from ..clock import Clock
from ..threads import Lock

_BURST_SECONDS = 0.25


class RateLimiter:
    """Limits threads together to `rate` bytes a second, with bursts of up to a quarter of a second's bytes.

    The reading thread waits here, so the connection fills up and the agent waits too.
    """

    def __init__(self, rate: int, clock: Clock) -> None:
        self._rate, self._clock = rate, clock
        self._paid_until = clock.monotonic()
        self._lock = Lock()
        self.slice = max(1, min(wire.MAX_CHUNK, int(rate * _BURST_SECONDS)))

    def spent(self, size: int) -> None:
        """Wait until another `size` bytes are within the rate."""
        with self._lock:
            now = self._clock.monotonic()
            self._paid_until = max(self._paid_until, now - _BURST_SECONDS) + size / self._rate
            wait = self._paid_until - now
        if wait > 0:
            self._clock.sleep(wait)
