"""The limit on the bandwidth of a run, which all its disks share."""

from __future__ import annotations

from ..agent import wire
from ..clock import Clock
from ..threads import Lock

_BURST_SECONDS = 0.25


class RateLimiter:
    """Keeps to `rate` bytes a second, counting from what was not used in the last quarter of a second.

    For threads, which share the rate. Who reads waits here, so the line fills up and the agent waits too.
    """

    def __init__(self, rate: int, clock: Clock) -> None:
        self._rate, self._clock = rate, clock
        self._paid = clock.monotonic()
        self._lock = Lock()
        self.slice = max(1, min(wire.MAX_CHUNK, int(rate * _BURST_SECONDS)))

    def spent(self, size: int) -> None:
        """Wait until `size` more bytes are within the rate."""
        with self._lock:
            now = self._clock.monotonic()
            self._paid = max(self._paid, now - _BURST_SECONDS) + size / self._rate
            wait = self._paid - now
        if wait > 0:
            self._clock.sleep(wait)
