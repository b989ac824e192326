"""A host that lacks something: descriptors, threads, space, a home. Each ends as an error that says what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import sandbox, settings
from coriolis_azure.errors import CoriolisAzureError, HostExhausted, InvalidInput, exhausted
from coriolis_azure.events import Event, Step
from coriolis_azure.model import Run
from coriolis_azure.run.journal import Journal, default_folder
from coriolis_azure.source import Source
from coriolis_azure.threads import every
from harness import image_runs
from harness.constants import DEADLINE
from harness.processes import Forked, command

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "coriolis_azure"]
CONNECTION = {
    "subscription_id": "00000000-0000-0000-0000-000000000000",
    "tenant": "contoso",
    "service_principal_credentials": {"client_id": "id", "client_secret": "s3cr3t-value"},
}


def run(*arguments: object, limit: Callable[[], None] | None = None, before: tuple[str, ...] = ()) -> str:
    """A command that must end with code 2 and without a trace; what it says."""
    line = [*before, *COMMAND, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "what to do: " in done.stderr
    return done.stderr


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Settings whose environment is refused: nothing is asked of any Azure."""
    for name, document in (("connection", CONNECTION), ("environment", {"location": 5})):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        (tmp_path / f"{name}.json").chmod(0o600)
    return ["-c", str(tmp_path / "connection.json"), "-e", str(tmp_path / "environment.json")]


def test_no_thread_can_be_started(tmp_path: Path) -> None:
    """A thread's stack is as large as this limit says, which no host has memory for."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 45, resource.RLIM_INFINITY))

    said = run("sandbox", "serve", tmp_path / "azure", limit=limit)
    assert "another thread" in said
    assert "ulimit -u" in said


def starved(line: list[str], free: int) -> None:
    """A process: a command to which so many descriptors are left."""
    from coriolis_azure.cli import entry  # noqa: F401 - it is read before
    from coriolis_azure.replica import verification  # noqa: F401 - so is this

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held: list[int] = []
    with suppress(OSError):
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    for descriptor in held[:free]:
        os.close(descriptor)
    command(line)


@pytest.mark.parametrize("free", range(4))
def test_no_descriptor_is_left(tmp_path: Path, free: int) -> None:
    image_runs.run(tmp_path / "os.raw", {0: image_runs.A})
    with Forked(starved, ["verify", str(tmp_path)], free) as process:
        out, errors = process.communicate(60)
    assert process.returncode in (2, 5), errors
    assert "Traceback" not in errors
    assert "Too many open files" in errors + out or free > 1


def test_json_that_is_nested_too_deeply(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "environment.json").write_text("[" * 200_000)
    assert "nested too deeply" in run("list", *files)


def test_a_user_without_a_home(tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    as_nobody = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
    if (
        not shutil.which("unshare")
        or subprocess.run([*as_nobody, "true"], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("user namespaces are not to be had here")
    (tmp_path / "environment.json").write_text(json.dumps({"location": "westeurope", "resource_group": "g"}))
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    said = run("list", *files, before=as_nobody)
    assert "no home folder" in said
    assert "Set XDG_STATE_HOME" in said


def test_standard_output_goes_to_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "schema", "connection"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 8
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["999999999d", "99999999999d", "900000d", "9" * 400 + "d"])
def test_a_huge_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"the duration .* is too long"):
        settings.duration(text)
    assert settings.duration("36500d") == 36500 * 86400


@pytest.mark.parametrize("text", ["9" * 400 + "GiB/s", "1001GiB/s"])
def test_a_huge_rate_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"the rate .* is too high"):
        settings.rate(text)
    assert settings.rate("1000GiB/s") == 1000 << 30


# A secret that everybody may read


def test_a_connection_that_every_user_may_read_is_warned_of(tmp_path: Path, files: list[str]) -> None:
    assert "every user" not in run("list", *files)
    (tmp_path / "connection.json").chmod(0o644)
    said = run("list", *files)
    assert (
        f"every user of this host can read {files[1]}, which contains a secret: chmod go-rwx {files[1]}"
        in said
    )
    assert "s3cr3t" not in said
    subprocess.run(["chmod", "go-rwx", files[1]], check=True)
    assert "every user" not in run("list", *files)


def test_only_what_holds_a_secret_is_warned_of(tmp_path: Path) -> None:
    file, key = tmp_path / "connection.json", tmp_path / "key.pem"
    for path in (file, key):
        path.touch()
        path.chmod(0o644)
    principal = {"client_id": "id", "client_certificate_path": str(key)}
    assert settings.exposed(file, {"subscription_id": "x"}) == []
    assert settings.exposed(file, ["no", "object"]) == []
    (warning,) = settings.exposed(file, {"service_principal_credentials": principal})
    assert str(key) in warning
    assert len(settings.exposed(file, {"user_credentials": {"username": "u", "password": "p"}})) == 1


# A journal that cannot be written


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    descriptor = os.open(folder / "fill", os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(descriptor, bytes(4096)):
            pass
    except OSError:
        pass
    finally:
        os.close(descriptor)


def test_a_journal_on_a_full_disk_ends_the_run_before_it_has_made_anything(small: Path) -> None:
    fill(small)
    with pytest.raises(InvalidInput, match=r"journal .* cannot be written: No space left") as caught:
        Journal(Run("ab", "s", "g", "w", "", "web"), small)
    assert caught.value.remedy == "Free space there, then run again."
    assert [path.name for path in small.iterdir()] == ["fill"]


def test_a_disk_that_is_full_in_the_middle_of_a_run_ends_it_with_all_ids_at_hand(small: Path) -> None:
    """What was meant last is not made, and not forgotten either."""
    with Journal(Run("ab", "s", "g", "w", "", "web"), small) as journal:
        fill(small)

        def intend_many() -> None:
            for number in range(1000):
                journal.intend(f"/{number}/{'x' * 100}")

        with pytest.raises(InvalidInput, match="cannot be written: No space left"):
            intend_many()
        assert journal.ids[-1].startswith(f"/{len(journal.ids) - 1}/")


# What tells it


def test_what_a_foreign_exception_comes_from_tells_what_is_missing() -> None:
    inner = OSError(24, "Too many open files")
    outer = ValueError("no answer")
    outer.__context__ = inner
    found = exhausted(outer)
    assert isinstance(found, HostExhausted)
    assert "ulimit -n" in found.remedy
    assert exhausted(MemoryError()) is not None
    assert exhausted(ValueError("can't start new thread")) is None
    assert exhausted(OSError(2, "No such file")) is None


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_what_this_host_lacks_for_a_request_is_no_fault_of_the_line_to_azure(
    served: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The libraries hold what they have caught as an argument of what they raise."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    documents = (json.loads((served / f"{name}.json").read_text()) for name in ("connection", "environment"))
    monkeypatch.setattr(ssl.SSLSocket, "do_handshake", fail)
    with Source(*documents) as source, pytest.raises(HostExhausted, match=os.strerror(number)):
        source.list_vms()


def test_a_folder_that_was_deleted_under_the_program_is_named_as_the_reason(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    gone = ("sh", "-c", f'cd "{tmp_path}/here" && rmdir ../here && exec "$@"', "sh")
    assert "the current folder was deleted" in run("sandbox", "serve", "azure", before=gone)


def test_a_relative_folder_of_state_is_ignored_as_xdg_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next run, in another folder, would not find the journal of a dead one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert default_folder() == tmp_path / ".local/state/coriolis-azure"


# A run from which something is taken in the middle


def starving(kind: str, step: str, settings: tuple[dict[str, Any], dict[str, Any]], images: str) -> None:
    """A process: a replication that has no threads or descriptors more once `step` begins. It prints how it ended."""
    from coriolis_azure.source import Source

    def report(event: Event) -> None:
        if isinstance(event, Step) and event.name == step:
            no_thread() if kind == "threads" else no_descriptor()

    with Source(*settings, report=report) as source:
        try:
            told = source.replicate("web", images).to_json()
        except CoriolisAzureError as error:
            told = error.to_json()
    print(json.dumps(told))


def no_thread() -> None:
    """The next one would have a stack that no host has memory for."""
    threading.stack_size(1 << 46)


def no_descriptor() -> None:
    """The next one would have a number above the limit."""
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_signs_of_life_go_on_after_one_for_which_there_was_no_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without them, another host takes the run for dead after two hours."""
    calls, later = list[int](), threading.Event()

    def act() -> None:
        calls.append(len(calls))
        if len(calls) <= 2:
            raise MemoryError
        later.set()

    with every(0.001, act):
        assert later.wait(DEADLINE)
    (record,) = caplog.records
    assert "failed" in record.message
    assert not record.exc_info


@pytest.mark.parametrize("step", ["boot worker", "snapshot", "copy", "clean up"])
@pytest.mark.parametrize("kind", ["threads", "descriptors"])
def test_a_run_that_has_nothing_left_ends_at_once_and_deletes_what_it_made(
    served: Path,
    tmp_path: Path,
    kind: str,
    step: str,
) -> None:
    before = sandbox.resources(served)
    documents = tuple(
        json.loads((served / f"{name}.json").read_text()) for name in ("connection", "environment")
    )
    with Forked(starving, kind, step, documents, str(tmp_path / "images")) as process:
        out, errors = process.communicate(20)
    assert "Traceback" not in errors, errors
    told = json.loads(out)
    assert told.get("left_behind", []) == []
    assert sandbox.resources(served) == before
    if step == "clean up":
        assert "error" not in told
    else:
        words, remedy = {
            "threads": ("another thread", "ulimit -u"),
            "descriptors": ("Too many open files", "ulimit -n"),
        }[kind]
        assert words in told["message"]
        assert remedy in told["remedy"]
