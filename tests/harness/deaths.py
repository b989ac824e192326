"""A process that ends in the middle of a run: nothing it does has an effect any more."""

from __future__ import annotations

from collections.abc import Callable

from coriolis_azure.sandbox import Request, Response


class Died(BaseException):
    """The process ended: nothing it does has an effect any more."""


def dying(at: int) -> Callable[[Request, Callable[[Request], Response]], Response]:
    """A network that is gone from this request on."""
    seen = 0

    def intercept(request: Request, answer: Callable[[Request], Response]) -> Response:
        nonlocal seen
        seen += 1
        if seen >= at:
            raise Died
        return answer(request)

    return intercept
