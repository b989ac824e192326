"""Limits how long we wait for Azure: retried requests, polled operations and listings; long waits are reported."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from itertools import repeat
from typing import Any, TypeVar

from azure.core.paging import ItemPaged
from azure.core.pipeline.policies import RetryPolicy
from azure.mgmt.core.polling.arm_polling import ARMPolling

from .. import errors
from ..clock import Clock
from ..events import Report, Wait, Waiting, counted
from . import names

T = TypeVar("T")
# The polling interval, in seconds, for operations on a VM, where Azure throttles more than 15 polls a minute, and for
# operations whose answers have no Retry-After.
POLLING_SECONDS = 5
# The first polls of an operation on anything but a VM come this soon, even if Azure asks for ten seconds: most of them
# take three. Azure allows thousands of those polls in three minutes.
_EARLY_SECONDS = (3.0, 3.0, 3.0, 4.0)
# Retries of a request that was throttled or that failed in a gateway. azure-core's default of three is used up within
# six seconds; an operation that is still running in Azure should survive a longer outage. Retry-After is obeyed.
_RETRIES = 6
# The limit for one operation. Azure itself gives up on a VM that does not start after about 25 minutes.
OPERATION_SECONDS = 45 * 60.0
_LONG_SECONDS = 10.0  # an operation that takes longer is reported as a wait
# The limit for one request with all its retries: Azure's request budgets refill within half an hour.
REQUEST_SECONDS = 30 * 60.0
# Limits that no real listing reaches: 100,000 VMs fill a few hundred pages.
LISTING_SECONDS, PAGES = 30 * 60.0, 10_000


class Retries(RetryPolicy[Any, Any]):
    """azure-core's retries, which obey Retry-After, limited to REQUEST_SECONDS. Throttling is reported.

    If Azure asks for a longer wait, there is no retry and its answer is the result: retrying too early only prolongs
    the throttling.
    """

    def __init__(self, report: Report, **options: Any) -> None:
        super().__init__(**{"retry_status": _RETRIES, **options})
        self._report = report

    def configure_retries(self, options: dict[str, Any]) -> dict[str, Any]:
        """The state of one request and its retries."""
        return {**super().configure_retries(options), "begun": time.monotonic(), "waited": 0.0}

    def increment(self, settings: dict[str, Any], response: Any = None, error: Any = None) -> bool:
        """Count a failure; return whether to retry the request."""
        retry = super().increment(settings, response, error)
        if error is not None and errors.exhausted(error):
            return False
        return (
            retry and _spent(settings) + self._pause(settings, None if error else response) <= REQUEST_SECONDS
        )

    def sleep(self, settings: dict[str, Any], transport: Any, response: Any = None) -> None:
        """Wait before a retry."""
        pause = self._pause(settings, response)
        if response is not None and response.http_response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            self._report(Waiting("Azure, which is throttling our requests", pause))
        super().sleep(settings, transport, response)
        settings["waited"] += pause

    def get_retry_after(self, response: Any) -> float | None:
        """The seconds that an answer asks to wait; None if it does not, or in words that mean nothing."""
        try:
            return super().get_retry_after(response)
        except ValueError:
            return None

    def _pause(self, settings: dict[str, Any], response: Any) -> float:
        retry_after = self.get_retry_after(response) if response is not None else None
        return retry_after or self.get_backoff_time(settings)


def _spent(settings: dict[str, Any]) -> float:
    """Seconds since a request was first sent: by the clock, or by the waits where tests hold the clock."""
    return max(time.monotonic() - float(settings["begun"]), float(settings["waited"]))


class Polling(ARMPolling):
    """azure-core's polling, on the calling thread, limited to OPERATION_SECONDS.

    The SDKs' pollers start threads of their own, but a process that cannot start any more must still clean up.
    """

    def __init__(self, verb: str, id: str, report: Report) -> None:
        super().__init__(timeout=POLLING_SECONDS)
        self._action, self._id = f"{verb} {id}", id
        self._begun, self._waited = time.monotonic(), 0.0
        self._early = repeat(POLLING_SECONDS) if names.is_vm(id) else iter(_EARLY_SECONDS)
        self._waiting = Wait(report, Clock(), f"Azure to {verb} {names.name_of(id)}", OPERATION_SECONDS)

    def initialize(self, client: Any, initial_response: Any, deserialization_callback: Any) -> None:
        """Read the first answer and poll until the operation ends, so that the poller has nothing left to do."""
        super().initialize(client, initial_response, deserialization_callback)
        if not self.finished():
            self.run()

    def _extract_delay(self) -> float:
        """The seconds until the next poll."""
        try:
            asked = max(float(super()._extract_delay()), 0)
        except ValueError:  # a Retry-After that is no number and no date
            asked = POLLING_SECONDS
        return min(asked, next(self._early, asked))

    def _delay(self) -> None:
        spent = max(time.monotonic() - self._begun, self._waited)
        left = OPERATION_SECONDS - spent
        if left <= 0:
            raise errors.DeadlinePassed(
                f"Azure did not {self._action} within {OPERATION_SECONDS / 60:.0f} minutes",
                resource=self._id,
            )
        pause = min(self._extract_delay(), left)
        if spent + pause > _LONG_SECONDS:
            self._waiting.still()
        self._sleep(pause)
        self._waited += pause


class Pages:
    """The pages of one listing. Detects a listing that loops or never ends."""

    def __init__(self) -> None:
        self._links: set[str] = set()
        self._until = time.monotonic() + LISTING_SECONDS

    def turned(self, link: str | None) -> None:
        """Record that a page has been read; `link` leads to the next one."""
        if not link:
            return
        if link in self._links or len(self._links) >= PAGES:
            raise errors.Unreadable(
                f"a listing does not end: there is another page after {counted(len(self._links) + 1, 'page')}"
            )
        if time.monotonic() > self._until:
            raise errors.DeadlinePassed(f"a listing did not end within {LISTING_SECONDS / 60:.0f} minutes")
        self._links.add(link)


def whole(listed: Iterable[T]) -> Iterator[T]:
    """Yield the items of an SDK's listing, page by page. Raises an error if the listing does not end."""
    if not isinstance(listed, ItemPaged):
        yield from listed
        return
    pages, limit = listed.by_page(), Pages()
    for page in pages:
        yield from page
        limit.turned(getattr(pages, "continuation_token", None))


def seconds_in(header: str | None) -> float | None:
    """The seconds in a Retry-After header; None if it is absent, a date or nonsense."""
    try:
        seconds = float(header) if header else math.nan
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None
