"""Whoever watches may go away, and anything may be raised: the run ends as it would, and nothing is left in Azure."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from coriolis_azure import sandbox
from coriolis_azure.errors import HostExhausted
from coriolis_azure.events import Event, Notice, Step, unfailing
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.command_line import COMMAND, SLOW
from harness.constants import MIB
from harness.processes import Forked, command, completed

pytestmark = pytest.mark.slow

Image = Callable[..., Path]


@pytest.fixture
def unchanged(served: Path) -> Iterator[None]:
    """Afterwards the sandbox holds what it held before."""
    before = sandbox.resources(served)
    yield
    assert sandbox.resources(served) == before


def replicating(settings: list[str], images: Path) -> list[str]:
    return ["replicate", *settings, "web", "--to", str(images), "--json"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("until", ["snapshot", "clean up"])
def test_a_closed_pipe_stops_no_run_and_a_good_one_ends_with_0(
    settings: list[str],
    tmp_path: Path,
    until: str,
) -> None:
    """As `2>&1 | head` does it: nobody reads any more, neither messages nor the result."""
    images = tmp_path / "images"
    with Forked(command, replicating(settings, images)) as running:
        next(event for event in running.stderr if json.loads(event).get("name") == until)
        running.stderr.close()
        running.stdout.close()
        assert running.wait(timeout=60) == 0
    completed(["verify", str(images)]).check_returncode()


@pytest.mark.usefixtures("unchanged")
def test_without_standard_error_a_run_does_its_work(settings: list[str], tmp_path: Path) -> None:
    line = " ".join([*COMMAND, *replicating(settings, tmp_path / "images")])
    done = subprocess.run(["sh", "-c", f"exec {line} 2>&-"], stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["left_behind"] == []


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("ignored", "code"), [(False, 130), (True, 0)], ids=["asked to end", "nohup"])
def test_a_closed_terminal_leaves_nothing(
    settings: list[str],
    tmp_path: Path,
    ignored: bool,
    code: int,
) -> None:
    """Closing it sends SIGHUP, and each write ends with EIO. With bars on the terminal."""
    ours, theirs = pty.openpty()

    def begin() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    line = [*COMMAND, *replicating(settings, tmp_path / "images")[:-1]]
    if not ignored:  # the run must not be over before the terminal is closed
        line += SLOW
    with subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=begin) as running:
        os.close(theirs)
        seen = b""
        while b"snapshot" not in seen:
            seen += os.read(ours, 4096)
        os.close(ours)
        assert running.wait(timeout=60) == code
    assert (tmp_path / "images/os.raw").exists() == ignored


# The Python API


@pytest.fixture
def web(azure: Sandbox, image: Image) -> Iterator[Sandbox]:
    """A VM; afterwards nothing but it is there."""
    azure.add_vm("web", image("os"), [image("data", MIB, seed=1)])
    before = azure.resources()
    yield azure
    assert azure.resources() == before


def watched(azure: Sandbox, report: Callable[[Event], None]) -> Source:
    return Source(azure.connection_info(), azure.environment(), report=report, transport=azure.transport())


@pytest.mark.parametrize("name", ["", "clean up"])
def test_a_report_that_raises_stops_nothing_and_is_logged_once(
    web: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def report(event: Event) -> None:
        if not name or (isinstance(event, Step) and event.name == name):
            raise OSError("the watcher is gone")

    with watched(web, report) as source:
        assert source.replicate("web", tmp_path / "images").left_behind == ()
    assert caplog.text.count("the watcher is gone") == 1


def test_a_sink_that_failed_once_is_told_the_next_events() -> None:
    told: list[Event] = []

    def report(event: Event) -> None:
        if event == Notice("1"):
            raise ValueError
        told.append(event)

    sink = unfailing(unfailing(report))
    for number in range(3):
        sink(Notice(str(number)))
    assert told == [Notice("0"), Notice("2")]
    with pytest.raises(KeyboardInterrupt):
        unfailing(lambda event: signal.raise_signal(signal.SIGINT))(Notice(""))


@pytest.mark.parametrize("step", ["/snapshots/", "/virtualMachines/"])
@pytest.mark.parametrize(
    "error", [MemoryError, LookupError, SystemExit, GeneratorExit, AssertionError, OSError]
)
def test_any_exception_is_cleaned_up_after(
    web: Sandbox, source: Source, tmp_path: Path, error: type[BaseException], step: str
) -> None:
    def struck(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "PUT" and f"{step}coriolis" in request.path:
            raise error("struck")
        return response

    web.intercept = struck
    # What this host lacks is an error of ours, with a remedy.
    with pytest.raises(HostExhausted if error is MemoryError else error) as raised:
        source.replicate("web", tmp_path / "images")
    assert error is MemoryError or str(raised.value) == "struck"
    web.intercept = None


@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", ["DELETE", "GET"])
def test_the_first_error_is_kept_whatever_becomes_of_the_clean_up(
    azure: Sandbox,
    source: Source,
    image: Image,
    tmp_path: Path,
    error: type[BaseException],
    method: str,
) -> None:
    azure.add_vm("web", image("os"))
    failed: list[str] = []

    def struck(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/disks/coriolis" in request.path:
            failed.append(request.path)
            raise AssertionError("the first")
        if failed and request.method == method and "/snapshots" in request.path:
            raise error("the second")
        return answer(request)

    azure.intercept = struck
    with pytest.raises(AssertionError, match="the first"):
        source.replicate("web", tmp_path / "images")
    azure.intercept = None
    assert len(list((tmp_path / "state/coriolis-azure").glob("*.journal"))) == 1
    assert source.sweep(timedelta(0))[1] == []
    assert not [each for each in azure.resources() if "coriolis" in each["id"]]
