"""Two hosts and one replica in Blob storage: the one that lost it to the other changes nothing, and says so.

Content goes A, B, A: what host 1 had begun to write, and what it would put into the manifest, must not be believed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import vhd
from coriolis_azure.azure import blobs
from coriolis_azure.azure.blobs import Storage
from coriolis_azure.azure.client import Azure
from coriolis_azure.clock import Clock
from coriolis_azure.errors import CoriolisAzureError, DestinationFailed
from coriolis_azure.replica import vhds
from coriolis_azure.replica.replica import Replica
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.settings import Connection
from harness.battles import honest, served
from harness.processes import Forked
from harness.replica_runs import CHUNK, SIZE, A, B, expected, run
from harness.replicas import AzuriteOnly, BlobPlace, SandboxPlace

pytestmark = [pytest.mark.slow]

FIRST, SECOND, LAST = {0: A, 1: B, 20: A}, {0: B, 1: B, 20: B, 31: A}, {0: A, 1: A, 20: A}


def right(place: BlobPlace, content: dict[int, bytes]) -> None:
    """The replica is `content`, byte for byte, and the next run thinks so too."""
    assert place.content(SIZE) == expected(content)
    assert vhd.content_size(place.whole()[-512:], len(place.whole()), "it") == len(place.whole()) - 512
    assert run(place, content) == []
    back = {**content, 31: B, 0: B}
    assert run(place, back) == sorted(
        at for at in {*content, *back} if content.get(at, bytes(CHUNK)) != back.get(at, bytes(CHUNK))
    )
    assert place.content(SIZE) == expected(back)


class Suspension:
    """Host 1 stops before its request number `at` that changes something, until it is let go."""

    def __init__(self, azure: Sandbox, at: int) -> None:
        self._azure, self._at, self._count = azure, at, 0
        self._host: threading.Thread | None = None
        self._leased = self._published = False
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.changes = 0  # of the other host
        self.early = self.late = False  # whether host 1 had not begun yet, or its manifest was in force
        self.taken = 0  # by which of its changes the other host took the VHD
        self.on_change: Callable[[int], None] = lambda number: None
        azure.intercept = self._intercept

    def host(self, thread: threading.Thread) -> None:
        """Which one is host 1."""
        self._host = thread

    def _intercept(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method in {"PUT", "DELETE"}:
            if threading.current_thread() is self._host:
                self._count += 1
                action = request.header("x-ms-lease-action")
                if self._count == self._at:
                    # What is left to do is to let go of what the replica no longer needs.
                    over = action == "release" or request.method == "DELETE"
                    self.early, self.late = not self._leased, self._published and over
                    self.stopped.set()
                    assert self.go_on.wait(60)
                self._leased = self._leased or action == "acquire"
                self._published = self._published or request.path.endswith(".vhd.manifest")
            else:
                self.changes += 1
                if request.header("x-ms-lease-action") in {"acquire", "change"}:
                    self.taken = self.changes
                self.on_change(self.changes)
        return answer(request)


def first_host(place: SandboxPlace, failures: list[BaseException]) -> Callable[[], None]:
    def work() -> None:
        try:
            run(place, SECOND)
        except CoriolisAzureError as error:
            failures.append(error)

    return work


def battle(azure: Sandbox, at: int, woken: int) -> tuple[bool, int]:
    """Host 1 stops before its change `at`, host 2 takes over, host 1 wakes at host 2's change `woken`; 0: at its end.

    Whether host 1 came so far, and how many changes host 2 made.
    """
    place, other = SandboxPlace(azure), SandboxPlace(azure)
    place.prefix = other.prefix = f"{at}/{woken}"
    run(place, FIRST)
    suspension, failures = Suspension(azure, at), list[BaseException]()
    host = threading.Thread(target=first_host(place, failures))
    suspension.host(host)
    host.start()
    while host.is_alive() and not suspension.stopped.wait(0.01):
        pass
    came = suspension.stopped.is_set()
    if came:
        azure.storage.end_leases()

        def wake(number: int) -> None:
            if number == woken:
                suspension.go_on.set()
                host.join(60)

        suspension.on_change = wake
        run(other, LAST)
        suspension.on_change = lambda number: None
        suspension.go_on.set()
    host.join(60)
    azure.intercept = None
    azure.storage.end_leases()
    if came:
        lost = not (suspension.early or suspension.late or 0 < woken <= suspension.taken)
        assert failures or not lost, f"{at}, {woken}: host 1 did not notice"
        assert other.content(SIZE) == expected(SECOND if suspension.early and woken == 0 else LAST)
        with other.open() as image:
            assert isinstance(image, Replica)
            assert honest(image), f"{at}, {woken}: the manifest says more than is there"
    return came, suspension.changes


def test_a_host_that_lost_the_replica_at_any_step_changes_nothing(azure: Sandbox) -> None:
    at = 1
    while battle(azure, at, 0)[0]:
        at += 1
    assert at > 12


def test_a_host_that_wakes_while_the_other_one_commits_changes_nothing(azure: Sandbox) -> None:
    """Host 1 has written some of its log; it wakes before each change of the other one."""
    woken = changes = 1
    while woken <= changes:
        came, changes = battle(azure, 11, woken)
        assert came
        woken += 1
    assert woken > 12


# With a process that is really suspended, here and in Azurite

SHORTEST_LEASE = 15  # seconds, which Azure grants; the test waits until it has expired


def host(place_of: Callable[..., BlobPlace], settings: tuple[Any, ...], stop: tuple[str, str]) -> None:
    """A process: host 1, which suspends itself right before a step of its commit: a method, and how the blob ends."""
    vhds.LEASE_SECONDS = SHORTEST_LEASE
    place, committing = place_of(*settings), False

    def stopping(name: str) -> Callable[..., Any]:
        method = getattr(blobs.Blob, name)

        def call(blob: blobs.Blob, *arguments: Any, **options: Any) -> Any:
            nonlocal committing
            if committing and name == stop[0] and blob.name.endswith(stop[1]):
                print("stopping", flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
            committing = committing or (name == "write" and len(arguments[1]) == vhd.FOOTER)
            return method(blob, *arguments, **options)

        return call

    for name in ("write", "put", "set_metadata", "delete"):
        setattr(blobs.Blob, name, stopping(name))
    try:
        run(place, SECOND)
    except DestinationFailed as error:
        raise SystemExit(error.exit_code) from None


def in_sandbox(connection: dict[str, Any]) -> BlobPlace:
    return BlobPlace(Storage(Azure(Connection.from_json(connection)), "sandbox", Clock()), "sandboxstorage")


def in_azurite(endpoint: str, certificate: Path, prefix: str) -> BlobPlace:
    return AzuriteOnly(endpoint, certificate).place(prefix)


@pytest.fixture(params=["sandbox", "azurite"])
def far(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Callable[..., BlobPlace], tuple[Any, ...]]]:
    """A place that processes reach, as what makes it."""
    if request.param == "sandbox":
        with Sandbox(tmp_path / "azure") as sandbox, served(sandbox) as connection:
            yield in_sandbox, (connection,)
        return
    azurite: AzuriteOnly = request.getfixturevalue("azurite")
    yield in_azurite, (azurite.endpoint, azurite.certificate, f"web/{request.node.name}")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("woken", ["between", "after"])
@pytest.mark.parametrize(
    "stop",
    [("put", ".manifest"), ("set_metadata", ".vhd"), ("delete", ".draft"), ("delete", ".redo")],
    ids=str,
)
def test_a_suspended_host_that_wakes_changes_nothing_and_ends_with_an_error(
    far: tuple[Callable[..., BlobPlace], tuple[Any, ...]],
    stop: tuple[str, str],
    woken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It wakes when host 2 has ended, or between host 2's manifest and the metadata that names it."""
    monkeypatch.setattr(vhds, "LEASE_SECONDS", SHORTEST_LEASE)
    place = far[0](*far[1])
    run(place, FIRST)
    with Forked(host, *far, stop) as first:
        assert first.stdout.readline() == "stopping\n"
        while state(first.pid) != "T":
            pass
        place.died()
        codes: list[int] = []

        def wake() -> None:
            first.send_signal(signal.SIGCONT)
            codes.append(first.wait(60))

        put = blobs.Blob.put

        def put_and_wake(blob: blobs.Blob, *arguments: Any, **options: Any) -> str:
            etag = put(blob, *arguments, **options)
            if woken == "between" and blob.name.endswith(".manifest") and not codes:
                wake()
            return etag

        with monkeypatch.context() as patched:
            patched.setattr(blobs.Blob, "put", put_and_wake)
            run(place, LAST)
        if woken == "after":
            wake()
    # With the replica published and the rest gone by now, there is nothing to fail at.
    over = stop[0] == "delete" and woken == "after"
    assert codes == [5] or (over and codes == [0])
    right(place, LAST)


def state(pid: int) -> str:
    """What the kernel says of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
