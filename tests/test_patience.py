"""What Azure asks us to wait for is waited for within bounds, told, and called off by the first Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from urllib3.util import parse_url

from coriolis_azure import errors, tls
from coriolis_azure.azure import names, patience, profiles
from coriolis_azure.clock import Clock, Scope, moment, retried
from coriolis_azure.events import Event, Wait, Waiting, silent
from coriolis_azure.model import Run
from coriolis_azure.run import cleanup, interrupts, lifetime, resources
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.sandbox.server import https
from coriolis_azure.source import Source
from coriolis_azure.threads import ordered, side_by_side
from harness.battles import served
from harness.clocks import Held
from harness.constants import DEADLINE
from harness.late_answers import NSG, Later

Answer = Callable[[Request], Response]


@pytest.fixture
def clock() -> Held:
    """What is waited for passes at once."""
    return Later()


@pytest.fixture
def nsg(source: Source) -> str:
    run = Run(names.new_run(), source.azure.subscription, "sandbox", "westeurope", "", "web")
    kept = resources.Resources(source.azure, run, Journal(run), {}, Later())
    return str(kept.create("nsg", "nsg", NSG)["id"])


def throttled(method: str, seconds: object) -> Callable[[Request, Answer], Response]:
    def intercept(request: Request, answer: Answer) -> Response:
        if request.method == method and request.path.startswith("/subscriptions/"):
            error = {"error": {"code": "TooManyRequests", "message": "later"}}
            return Response.of(429, error, {"Retry-After": str(seconds)})
        return answer(request)

    return intercept


def test_a_delete_that_may_be_tried_in_an_hour_is_not_waited_for(
    azure: Sandbox, source: Source, nsg: str, clock: Held
) -> None:
    azure.intercept = throttled("DELETE", 3600)
    assert resources.delete(source.azure, [nsg], clock) == [nsg]
    assert clock.monotonic() == 0
    with pytest.raises(errors.Throttled) as caught:
        source.azure.delete(nsg)
    assert caught.value.facts["retry_after"] == 3600
    azure.intercept = None
    assert resources.delete(source.azure, [nsg], clock) == []


def test_a_list_that_may_be_asked_for_in_eleven_days_is_not_waited_for(
    azure: Sandbox, source: Source, clock: Held
) -> None:
    azure.intercept = throttled("GET", 999_999)
    with pytest.raises(errors.Throttled):
        source.list_vms()
    assert clock.monotonic() == 0


@pytest.mark.parametrize("nonsense", ["soon", "-5", "nan"])
def test_a_retry_after_that_means_nothing_is_no_bug(
    azure: Sandbox, source: Source, nsg: str, clock: Held, nonsense: str
) -> None:
    azure.intercept = throttled("GET", nonsense)
    with pytest.raises(errors.Throttled):
        source.list_vms()

    def slow(request: Request, answer: Answer) -> Response:
        if "operations/" in request.path and clock.monotonic() < 1000:
            return Response.of(200, {"status": "InProgress"}, {"Retry-After": nonsense})
        return answer(request)

    azure.intercept = slow
    source.azure.delete(nsg)
    assert source.azure.find(nsg) is None


@pytest.mark.parametrize(
    ("verb", "path", "polls"),
    [
        ("delete", "/networkSecurityGroups/", [0, 3, 6, 9, 13, 23]),
        ("start", "/virtualMachines/", [0, 5, 10, 15, 20]),
    ],
    ids=["network", "VM"],
)
def test_operations_that_usually_take_seconds_are_polled_after_seconds_and_vms_not_too_often(
    azure: Sandbox,
    source: Source,
    nsg: str,
    clock: Held,
    image: Callable[..., Path],
    verb: str,
    path: str,
    polls: list[float],
) -> None:
    azure.add_vm("web", image("os"))
    id = nsg if verb == "delete" else source.inspect("web").id
    asked: list[float] = []

    def slow(request: Request, answer: Answer) -> Response:
        if "operations/" in request.path and len(asked) < len(polls):
            asked.append(clock.monotonic())
            return Response.of(200, {"status": "InProgress"}, {"Retry-After": "10"})
        return answer(request)

    azure.intercept = slow
    getattr(source.azure, verb)(id)
    assert path in id
    assert asked == polls


def test_throttling_is_waited_out_for_half_an_hour_in_all_and_told(
    azure: Sandbox, source: Source, clock: Held, told: list[Event]
) -> None:
    azure.intercept = throttled("GET", 700)
    with pytest.raises(errors.Throttled):
        source.list_vms()
    assert clock.monotonic() == 1400
    assert [event.seconds for event in told if isinstance(event, Waiting)] == [700, 700]


@pytest.mark.parametrize("new", [False, True], ids=["a circle", "ever new"])
@pytest.mark.parametrize("path", ["virtualMachines", "locks"])
def test_a_listing_without_end_is_an_error(
    azure: Sandbox, source: Source, monkeypatch: pytest.MonkeyPatch, new: bool, path: str
) -> None:
    monkeypatch.setattr(patience, "PAGES", 20)
    asked: list[str] = []

    def endless(request: Request, answer: Answer) -> Response:
        if request.method == "GET" and request.path.endswith(f"/{path}"):
            asked.append(request.url)
            link = request.url.partition("&page=")[0] + f"&page={len(asked) if new else 0}"
            return Response.of(200, {"value": [], "nextLink": link})
        return answer(request)

    azure.intercept = endless
    act: dict[str, Callable[[], object]] = {
        "locks": lambda: source.azure.locks(f"/subscriptions/{source.azure.subscription}"),
        "virtualMachines": source.list_vms,
    }
    with pytest.raises(errors.Unreadable, match="does not end"):
        act[path]()
    assert len(asked) == (21 if new else 2)


def test_a_listing_that_takes_longer_than_half_an_hour_is_an_error(
    azure: Sandbox, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert patience.LISTING_SECONDS == 1800
    monkeypatch.setattr(patience, "LISTING_SECONDS", -1)
    pages: list[int] = []

    def slow(request: Request, answer: Answer) -> Response:
        if request.path.endswith("/locks"):
            pages.append(len(pages))
            return Response.of(200, {"value": [], "nextLink": f"{request.url}&page={len(pages)}"})
        return answer(request)

    azure.intercept = slow
    with pytest.raises(errors.DeadlinePassed, match="a listing did not end within"):
        source.azure.locks(f"/subscriptions/{source.azure.subscription}")
    assert len(pages) == 1


@pytest.mark.slow
def test_an_operation_without_end_ends_after_its_time_and_is_told(
    azure: Sandbox, source: Source, nsg: str, clock: Held, told: list[Event]
) -> None:
    def endless(request: Request, answer: Answer) -> Response:
        if "operations/" in request.path:
            return Response.of(200, {"status": "InProgress"}, {"Retry-After": "999999"})
        return answer(request)

    azure.intercept = endless
    with pytest.raises(errors.DeadlinePassed, match="45 minutes"):
        source.azure.delete(nsg)
    assert clock.monotonic() == patience.OPERATION_SECONDS
    before = clock.monotonic()
    azure.intercept = lambda request, answer: (
        Response.of(200, {"status": "InProgress"}) if "operations/" in request.path else answer(request)
    )
    with pytest.raises(errors.DeadlinePassed):
        source.azure.put(nsg, {"location": "westeurope", **NSG})
    assert clock.monotonic() == before + patience.OPERATION_SECONDS
    whats = list(
        dict.fromkeys(event.what.partition(" coriolis")[0] for event in told if isinstance(event, Waiting))
    )
    assert whats == ["Azure to delete", "Azure to create"]


def test_operations_need_no_thread(azure: Sandbox, source: Source, nsg: str) -> None:
    before = threading.active_count()
    seen: list[int] = []

    def count(request: Request, answer: Answer) -> Response:
        seen.append(threading.active_count())
        return answer(request)

    azure.intercept = count
    source.azure.delete(nsg)
    assert set(seen) == {before}


# Called off


def test_an_interrupt_ends_the_waits_of_all_threads_at_once() -> None:
    """Each waits in a map within a map."""
    waiting = threading.Barrier(2)
    slept: list[int] = []

    def work(number: int) -> None:
        waiting.wait(DEADLINE)
        if number:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        Clock().sleep(DEADLINE)
        slept.append(number)

    def maps(number: int) -> None:
        list(ordered(work, [number], threads=1, ahead=1))

    with pytest.raises(KeyboardInterrupt):
        list(ordered(maps, range(2), threads=2, ahead=2))
    assert slept == []


def test_a_thread_that_an_interrupt_hides_from_its_pool_is_waited_for_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Ctrl-C does that comes while the pool starts a thread: what it makes in Azure would be left."""
    begun, ended, start = threading.Event(), list[int](), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert begun.wait(DEADLINE)
        raise KeyboardInterrupt

    def work(number: int) -> None:
        begun.set()
        try:
            Clock().sleep(3600)
        finally:
            ended.append(number)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(ordered(work, [1], threads=1, ahead=1))
    assert ended == [1]


@pytest.mark.parametrize("is_whole_run", [True, False])
def test_what_threads_make_after_a_second_interrupt_is_deleted_too(
    azure: Sandbox, source: Source, is_whole_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed terminal and systemd send two signals. The second one comes while the threads are joined."""
    run = Run(names.new_run(), source.azure.subscription, "sandbox", "westeurope", "", "web")
    journal, before = Journal(run), azure.resources()
    made = resources.Resources(source.azure, run, journal, {}, Later())
    cleaned_up, shutdown = threading.Event(), ThreadPoolExecutor.shutdown

    def interrupted(pool: ThreadPoolExecutor) -> None:
        monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
        raise KeyboardInterrupt

    def slow(request: Request, answer: Answer) -> Response:
        if request.method == "PUT":
            monkeypatch.setattr(ThreadPoolExecutor, "shutdown", interrupted)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            cleaned_up.wait(0.5)  # a clean-up that does not wait for this takes far less
        return answer(request)

    azure.intercept = slow
    work = Scope()
    block = (
        lifetime.temporary(source.context, made, journal, work=work)
        if is_whole_run
        else made.undone_on_error()
    )
    with pytest.raises(KeyboardInterrupt), work.entered(), block:
        list(ordered(lambda _: made.create("nsg", "nsg", NSG), [1], threads=1, ahead=1))
    cleaned_up.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(DEADLINE)
    assert azure.resources() == before


def test_of_work_side_by_side_the_first_error_ends_the_waits_of_the_rest_and_is_raised() -> None:
    ended: list[str] = []

    def wait() -> None:
        try:
            Clock().sleep(3600)
        except errors.WaitEnded:
            ended.append("called off")
            raise

    def fail() -> None:
        raise errors.Unreachable("no")

    with pytest.raises(errors.Unreachable, match="no"):
        side_by_side(wait, fail)
    assert ended == ["called off"]
    assert side_by_side(lambda: 1, lambda: "b") == [1, "b"]


def test_the_first_interrupt_of_a_clean_up_ends_long_waits_and_no_short_ones() -> None:
    """What Azure is deleting is seen through; what it asks us to wait for is left to the next clean-up."""
    waits: list[str] = []
    said: list[str] = []

    def wait(seconds: float) -> None:
        try:
            Clock().sleep(seconds)
            waits.append("waited")
        except errors.WaitEnded:
            waits.append("called off")

    with interrupts.shielded(said.append):
        signal.raise_signal(signal.SIGINT)
        wait(0.2)
        wait(3600)
        list(ordered(wait, [3600, 3600], threads=2, ahead=2))
        while not said:
            time.sleep(0.01)
    assert waits == ["waited", *["called off"] * 3]
    assert "still deleting" in said[0]


def test_the_second_interrupt_ends_all_waits_of_a_clean_up() -> None:
    slept: list[float] = []

    def wait(seconds: float) -> None:
        Clock().sleep(seconds)
        slept.append(seconds)

    def interrupt(text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def twice_interrupted() -> None:
        with interrupts.shielded(interrupt):  # again, once the first one was noted
            signal.raise_signal(signal.SIGINT)
            list(ordered(wait, [20, 20], threads=2, ahead=2))

    with pytest.raises(KeyboardInterrupt):
        twice_interrupted()
    assert slept == []


def test_a_clean_up_is_not_called_off_with_the_work_around_it() -> None:
    scope = Scope()
    scope.cancel()
    with scope.entered():
        with pytest.raises(errors.WaitEnded):
            Clock().sleep(1)
        with interrupts.shielded(lambda text: None):
            Clock().sleep(0.01)


def test_a_hurried_clean_up_tries_everything_once(
    azure: Sandbox, source: Source, nsg: str, clock: Held
) -> None:
    def busy(request: Request, answer: Answer) -> Response:
        if request.method == "DELETE":
            return Response.of(409, {"error": {"code": "OperationNotAllowed", "message": "busy"}})
        return answer(request)

    azure.intercept = busy
    scope = Scope()
    scope.hurry()
    with scope.entered():
        assert resources.delete(source.azure, [nsg], clock) == [nsg]
    assert clock.monotonic() == 0


@pytest.mark.slow
@pytest.mark.parametrize("dripping", ["head", "body"])
def test_an_answer_that_trickles_ends_after_its_time(
    azure: Sandbox, monkeypatch: pytest.MonkeyPatch, dripping: str
) -> None:
    """Each byte comes within the library's limit, and the last one never."""
    monkeypatch.setattr(tls, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.3)
    over = threading.Event()
    send = https._Handler._send

    def drip(handler: https._Handler, response: Response) -> None:
        if not handler.path.startswith("/subscriptions/"):
            send(handler, response)
            return
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
        handler.wfile.write(head if dripping == "body" else head[:10])
        while not over.wait(0.02):
            handler.wfile.write(b" ")

    monkeypatch.setattr(https._Handler, "_send", drip)
    with served(azure) as connection, Source(connection, azure.environment()) as source:
        begun = time.monotonic()
        with pytest.raises(errors.CloudUnreachable):
            source.azure.groups()
        assert 0.2 < time.monotonic() - begun < DEADLINE
        over.set()


# Clocks


def test_ages_are_by_azures_clock(azure: Sandbox, connect: Callable[..., Source], nsg: str) -> None:
    """A host that is three hours fast deletes nobody's living run; what it makes can be deleted elsewhere."""
    fast, right = connect(clock=Later(hours=3)), connect(clock=Later())
    assert fast.sweep(timedelta(hours=2)) == ([], [])
    run = Run(names.new_run(), fast.azure.subscription, "sandbox", "westeurope", "", "web")
    made = fast.resources(run, Journal(run))
    made.create("nsg", "nsg", NSG)
    made.show_life()
    alive = {found.run: found.alive for found in cleanup.leftovers(right.context)}[run.id]
    assert alive is not None
    assert abs(alive - Clock().now()) < timedelta(minutes=1)
    assert right.sweep(timedelta(hours=2)) == ([], [])
    assert {found.run for found in right.sweep(timedelta(0))[0]} >= {run.id}


def test_a_proxys_clock_is_not_azures(azure: Sandbox, source: Source, nsg: str) -> None:
    """A page that it answers with may have any time: with it, a sweep would delete what lives."""
    azure.intercept = lambda request, answer: Response(
        403, {"Content-Type": "text/html", "Date": "Wed, 21 Oct 2099 07:28:00 GMT"}, b"<html>"
    )
    with pytest.raises(errors.Denied):
        source.azure.find(nsg)
    assert abs(source.azure.now(Clock()) - Clock().now()) < timedelta(minutes=1)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01"])
def test_what_is_no_moment_in_utc_is_none(text: str) -> None:
    assert moment(text) is None
    assert moment("2026-01-01T01:00:00+02:00") == datetime(2025, 12, 31, 23, tzinfo=timezone.utc)


def test_what_is_from_the_future_is_deleted_by_an_age_of_zero(azure: Sandbox, source: Source) -> None:
    id = names.resource_id(source.azure.subscription, "sandbox", "nsg", "coriolis-x-nsg")
    tags = {names.RUN_TAG: "x", names.MADE_TAG: "2999-01-01T00:00:00Z"}
    source.azure.put(id, {**NSG, "location": "westeurope", "tags": tags})
    assert source.sweep(timedelta(hours=2)) == ([], [])
    assert source.sweep(timedelta(0))[1] == []
    assert source.azure.find(id) is None


# Where our token goes


@pytest.mark.parametrize(
    "evil",
    [
        "https://management.example.net/subscriptions/x",
        # A backslash ends the host for the library that connects, and for browsers, but not for urllib.parse.
        "https://management.example.net\\@sandbox.invalid/subscriptions/x",
    ],
)
@pytest.mark.parametrize(
    "where", ["nextLink", "own next page", "Azure-AsyncOperation", "Location", "account"]
)
def test_no_token_goes_to_a_host_that_an_answer_names(
    azure: Sandbox, source: Source, nsg: str, where: str, evil: str
) -> None:
    asked: list[str] = []

    def lie(request: Request, answer: Answer) -> Response:
        if request.url.startswith("https://management.example.net"):
            asked.append(request.header("Authorization") or "")
        if where in {"nextLink", "own next page"} and "/providers/" in request.path:
            return Response.of(200, {"value": [], "nextLink": evil})
        if request.method == "DELETE" and where in {"Azure-AsyncOperation", "Location"}:
            return Response(202, {where: evil})
        if where == "account" and request.path.endswith("/storageAccounts/a"):
            blob = {"primaryEndpoints": {"blob": evil.removesuffix("subscriptions/x")}}
            return Response.of(200, {"id": request.path, "location": "westeurope", "properties": blob})
        return answer(request)

    azure.intercept = lie
    act: dict[str, Callable[[], object]] = {
        "nextLink": source.list_vms,
        "own next page": lambda: source.azure.locks(f"/subscriptions/{source.azure.subscription}"),
        "Azure-AsyncOperation": lambda: source.azure.delete(nsg),
        "Location": lambda: source.azure.delete(nsg),
        "account": lambda: source.storage.account("a").container("c").exists(),
    }
    with pytest.raises(errors.Unreadable, match=r"management\.example\.net.* does not belong to this cloud"):
        act[where]()
    assert asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_nothing_follows_a_redirect_out_of_the_cloud(
    azure: Sandbox, source: Source, nsg: str, method: str, status: int
) -> None:
    """A request's body may hold the worker's keys, and what a stranger answers is not Azure's word."""
    strange: list[str] = []

    def redirect(request: Request, answer: Answer) -> Response:
        if request.url.startswith("https://example.net"):
            strange.append(request.method)
        if request.method == method and request.path.startswith("/subscriptions/"):
            return Response(status, {"Location": "https://example.net/x"})
        return answer(request)

    azure.intercept = redirect
    act: dict[str, Callable[[], object]] = {
        "GET": source.list_vms,
        "PUT": lambda: source.azure.put(nsg, {**NSG, "location": "westeurope"}),
        "DELETE": lambda: source.azure.delete(nsg),
    }
    with pytest.raises(errors.AzureError):
        act[method]()
    assert strange == []


def test_a_redirect_within_the_cloud_is_followed(azure: Sandbox, source: Source, nsg: str) -> None:
    asked: list[str] = []

    def redirect(request: Request, answer: Answer) -> Response:
        asked.append(request.url)
        if request.path == nsg and "moved" not in request.query:
            return Response(307, {"Location": f"{request.url}&moved=1"})
        return answer(request)

    azure.intercept = redirect
    assert source.azure.get(nsg)["id"] == nsg
    assert asked[-1].endswith("moved=1")


@pytest.mark.parametrize(
    ("url", "owned"),
    [
        ("https://management.azure.com/subscriptions", True),
        ("https://westeurope.management.azure.com/x", True),
        ("https://account.blob.core.windows.net/c", True),
        ("https://account.z12.blob.storage.azure.net/c", True),
        ("http://management.azure.com/x", False),
        ("https://management.azure.com.example.net/x", False),
        ("https://xmanagement.azure.com/x", False),
        ("https://blob.core.windows.net.evil.net/x", False),
        ("https://management.azure.com@evil.net/x", False),
        ("https://account.queue.core.windows.net/c", False),
        ("https://MANAGEMENT.azure.com:443/x", True),
        ("https://management.azure.com", True),
        ("https://management.azure.com?x", True),
        ("https://evil.net\\@management.azure.com/x", False),
        ("https://evil.net\\.management.azure.com/x", False),
        ("https://evil.net\t.management.azure.com/x", False),
        ("https://evil.net／.management.azure.com/x", False),  # noqa: RUF001 - splitting it raises ValueError
        ("https://user:word@management.azure.com/x", False),
        ("https://management.azure.com:8443/x", False),
        ("https://management.azure.com:x/x", False),
        ("https://management.azure.com./x", False),
        ("https://[", False),
        ("//management.azure.com/x", False),
    ],
)
def test_the_hosts_of_the_public_cloud(url: str, owned: bool) -> None:
    assert profiles.CLOUDS["AzureCloud"].owns(url) == owned


def test_another_port_of_the_manager_is_another_service() -> None:
    for host in ("127.0.0.1", "[::1]"):
        cloud = profiles.Profile("https://login.local", f"https://{host}:8443", "", ("", ""))
        ports = [f"https://{host}{port}/x" for port in (":8443", ":9000", "")]
        assert [cloud.owns(url) for url in ports] == [True, False, False]


_ODD = "@:/\\?#.;%[]\t\n\0 。／＠：４443xX"  # noqa: RUF001


@given(
    st.lists(
        st.sampled_from(["https://", "evil.net", "management.azure.com", "a.blob.core.windows.net", *_ODD]),
        max_size=7,
    )
)
def test_whoever_is_ours_is_connected_to(pieces: list[str]) -> None:
    """The check and the library that connects find the same host in a URL."""
    url = "https://" + "".join(pieces)
    if not profiles.CLOUDS["AzureCloud"].owns(url):
        return
    host = parse_url(str(requests.Request("GET", url).prepare().url)).host or ""
    assert host == "management.azure.com" or host.endswith(
        (".management.azure.com", ".blob.core.windows.net")
    )


# Waiting, and trying again


def test_a_wait_knows_its_limit_and_is_told_of_every_ten_seconds() -> None:
    clock = Held()
    told: list[Event] = []
    waiting = Wait(told.append, clock, "the tide", 30)
    looks = 0
    while waiting.left > 0:
        waiting.pause(4, percent=looks)
        looks += 1
    assert (looks, waiting.waited) == (8, 32)
    assert told == [
        Waiting("the tide", 30, 0.0, 0),
        Waiting("the tide", 30, 12.0, 3),
        Waiting("the tide", 30, 24.0, 6),
    ]
    assert Wait(silent, clock, "ever").left == math.inf


@pytest.mark.parametrize(("refusals", "slept"), [(0, 0), (1, 1), (2, 4)])
def test_what_is_refused_is_tried_again_after_each_pause(refusals: int, slept: float) -> None:
    clock, tries = Held(), iter(range(9))

    def act() -> str:
        if next(tries) < refusals:
            raise errors.Unreachable("not yet")
        return "done"

    assert retried(act, errors.Unreachable, (1, 3), clock) == "done"
    assert clock.monotonic() == slept


def test_after_the_last_pause_a_refusal_is_final_and_another_error_is_at_once() -> None:
    clock, raised = Held(), []

    def refused() -> None:
        raised.append(errors.Unreachable("never"))
        raise raised[-1]

    with pytest.raises(errors.Unreachable):
        retried(refused, errors.Unreachable, (1, 3), clock)
    assert (len(raised), clock.monotonic()) == (3, 4)
    with pytest.raises(errors.Unreachable):
        retried(refused, errors.HostKeyChanged, (1, 3), clock)
    assert len(raised) == 4
