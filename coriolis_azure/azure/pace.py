"""How many requests at a time a host of Azure is sent: as many as make it faster, and fewer once it says it is busy.

Azure limits both the bytes and the requests per second that one snapshot serves, and a link has a delay of its own, so
no fixed number is right. The number grows by a quarter as long as the rate grows with it, and goes back if it does
not; each "busy" halves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..clock import Clock
from ..threads import Condition

_FEWEST, _FIRST = 2, 8
_ROUND_SECONDS, _ROUND_REQUESTS = 0.5, 2  # the least time, and requests per place, that a rate is judged by
_GAIN = 1.05  # a higher number must pay off by this factor
_REST_ROUNDS = 20  # rounds without a try after one that did not pay off, or after "busy"
_REQUEST_BYTES = (
    120 << 10
)  # what a request weighs beside its bytes: Azure limits both, to 60 MiB and 500 a second


@dataclass
class Rate:
    """Decides on the number of requests at a time, from what each round has moved."""

    most: int
    limit: int = _FIRST
    _rest: int = 0
    _before: tuple[int, float] | None = None  # the number before the present try, and its rate

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.most)

    def judge(self, rate: float) -> None:
        """Take note of a round at the present limit, with all places taken, and how much it moved in a second."""
        if self._before is not None:
            limit, slower = self._before
            self._before = None
            if rate < slower * _GAIN:
                self.limit, self._rest = limit, _REST_ROUNDS
                return
        if self._rest:
            self._rest -= 1
        elif self.limit < self.most:
            self._before = self.limit, rate
            self.limit = min(self.most, self.limit + max(1, self.limit // 4))

    def busy(self) -> None:
        """Azure has refused a request because there are too many."""
        self.limit, self._rest, self._before = max(_FEWEST, self.limit // 2), _REST_ROUNDS, None


@dataclass
class _Round:
    begun: float
    requests: int = 0
    moved: int = 0
    waited: bool = False  # whether a request had to wait for a place
    busy: bool = False


class Pace:
    """Lets requests through, as many at a time as `Rate` allows, `most` in all. For threads."""

    def __init__(self, clock: Clock, most: int) -> None:
        self._clock, self._rate = clock, Rate(most)
        self._free = Condition()
        self._under_way = 0
        self._round = _Round(clock.monotonic())

    @property
    def limit(self) -> int:
        """The number of requests at a time at present."""
        return self._rate.limit

    @contextmanager
    def request(self, size: int) -> Iterator[None]:
        """Within the block, a request for `size` bytes is under way."""
        with self._free:
            while self._under_way >= self._rate.limit:
                self._round.waited = True
                self._free.wait()
            self._under_way += 1
        moved = 0
        try:
            yield
            moved = size + _REQUEST_BYTES
        finally:
            with self._free:
                self._under_way -= 1
                self._record(moved)
                self._free.notify_all()

    def busy(self) -> None:
        """Azure has refused a request because there are too many. Counts once a round."""
        with self._free:
            if not self._round.busy:
                self._round.busy = True
                self._rate.busy()

    def _record(self, moved: int) -> None:
        """Count a request; at the end of a round, judge it."""
        now, current = self._clock.monotonic(), self._round
        current.requests += 1
        current.moved += moved
        seconds = now - current.begun
        if seconds < _ROUND_SECONDS or current.requests < _ROUND_REQUESTS * self._rate.limit:
            return
        if current.waited and not current.busy:
            self._rate.judge(current.moved / seconds)
        self._round = _Round(now)
