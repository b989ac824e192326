"""How long Azure is waited for: repeated requests, polled operations, listings; each has a bound and is told of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any, TypeVar

from azure.core.paging import ItemPaged
from azure.core.pipeline.policies import RetryPolicy
from azure.mgmt.core.polling.arm_polling import ARMPolling

from .. import errors
from ..clock import Clock
from ..events import Report, Wait, Waiting, counted
from . import names

T = TypeVar("T")
# Seconds between two looks at an operation for which Azure sets no pace. A VM's operations may be asked for
# 15 times a minute before Azure throttles.
POLLING_SECONDS = 5
# How often a request that was throttled, or that a gateway failed, is repeated: azure-core's own three are over in six
# seconds, which an operation that runs on meanwhile should survive. Retry-After is obeyed.
_RETRIES = 6
# The longest that one operation may take. Azure itself gives up on a VM that does not start after about 25 minutes.
OPERATION_SECONDS = 45 * 60.0
_LONG_SECONDS = 10.0  # an operation that takes longer is told of
# The longest that one request may take with all its repetitions: Azure's budgets of requests are filled within half
# an hour.
REQUEST_SECONDS = 30 * 60.0
# What no listing exceeds: a hundred thousand VMs come in some hundred pages.
LISTING_SECONDS, PAGES = 30 * 60.0, 10_000


class Retries(RetryPolicy[Any, Any]):
    """azure-core's retries, which obey Retry-After, for REQUEST_SECONDS at most. Throttling is told.

    Where Azure asks for more, its answer is the result: a retry before that only prolongs throttling.
    """

    def __init__(self, report: Report, **options: Any) -> None:
        super().__init__(**{"retry_status": _RETRIES, **options})
        self._report = report

    def configure_retries(self, options: dict[str, Any]) -> dict[str, Any]:
        """What is known of one request and its repetitions."""
        return {**super().configure_retries(options), "begun": time.monotonic(), "waited": 0.0}

    def increment(self, settings: dict[str, Any], response: Any = None, error: Any = None) -> bool:
        """Count a failure; whether the request is repeated."""
        again = super().increment(settings, response, error)
        if error is not None and errors.exhausted(error):
            return False
        return (
            again and _spent(settings) + self._pause(settings, None if error else response) <= REQUEST_SECONDS
        )

    def sleep(self, settings: dict[str, Any], transport: Any, response: Any = None) -> None:
        """Wait before a repetition."""
        pause = self._pause(settings, response)
        if response is not None and response.http_response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            self._report(Waiting("Azure, which throttles our requests", pause))
        super().sleep(settings, transport, response)
        settings["waited"] += pause

    def _pause(self, settings: dict[str, Any], response: Any) -> float:
        asked = self.get_retry_after(response) if response is not None else None
        return asked or self.get_backoff_time(settings)


def _spent(settings: dict[str, Any]) -> float:
    """Seconds since a request was first sent: by the clock, or by what was waited where time is held."""
    return max(time.monotonic() - float(settings["begun"]), float(settings["waited"]))


class Polling(ARMPolling):
    """azure-core's polling, on the calling thread, for OPERATION_SECONDS at most.

    The SDKs' pollers use threads of their own, and a process that has none left must be able to clean up.
    """

    def __init__(self, verb: str, id: str, report: Report) -> None:
        super().__init__(timeout=POLLING_SECONDS)
        self._what, self._id = f"{verb} {id}", id
        self._begun, self._waited = time.monotonic(), 0.0
        self._waiting = Wait(report, Clock(), f"Azure to {verb} {names.name_of(id)}", OPERATION_SECONDS)

    def initialize(self, client: Any, initial_response: Any, deserialization_callback: Any) -> None:
        """Read the first answer and see the operation through: the poller then has nothing left to do."""
        super().initialize(client, initial_response, deserialization_callback)
        if not self.finished():
            self.run()

    def _delay(self) -> None:
        spent = max(time.monotonic() - self._begun, self._waited)
        left = OPERATION_SECONDS - spent
        if left <= 0:
            raise errors.DeadlinePassed(
                f"Azure did not finish to {self._what} within {OPERATION_SECONDS / 60:.0f} minutes",
                resource=self._id,
            )
        pause = min(self._extract_delay(), left)
        if spent + pause > _LONG_SECONDS:
            self._waiting.still()
        self._sleep(pause)
        self._waited += pause


class Pages:
    """The pages of one listing: one that goes in a circle, or on for ever, is ended."""

    def __init__(self) -> None:
        self._links: set[str] = set()
        self._until = time.monotonic() + LISTING_SECONDS

    def turned(self, link: str | None) -> None:
        """After a page: `link` is where the next one is."""
        if not link:
            return
        if link in self._links or len(self._links) >= PAGES:
            raise errors.Unreadable(
                f"a listing does not end: {counted(len(self._links) + 1, 'page')}, and still a next one"
            )
        if time.monotonic() > self._until:
            raise errors.DeadlinePassed(f"a listing did not end within {LISTING_SECONDS / 60:.0f} minutes")
        self._links.add(link)


def whole(listed: Iterable[T]) -> Iterator[T]:
    """What an SDK lists, page by page, if it ends."""
    if not isinstance(listed, ItemPaged):
        yield from listed
        return
    pages, turn = listed.by_page(), Pages()
    for page in pages:
        yield from page
        turn.turned(getattr(pages, "continuation_token", None))


def seconds_in(header: str | None) -> float | None:
    """The seconds of a Retry-After header; None without one, or where it is a date."""
    try:
        return float(header) if header else None
    except ValueError:
        return None
