"""What a program needs that takes the product into its own: its credential, its destination, events, an end at will."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from azure.identity import ClientSecretCredential

from coriolis_azure import Destination, Manifest, Source
from coriolis_azure.azure.sign_in import profile_for
from coriolis_azure.errors import Cancelled
from coriolis_azure.events import Copied, Event, Step
from coriolis_azure.replica.manifest import ZERO
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.settings import Connection
from harness.constants import MIB

CONTENT = (b"system" * 40_000).ljust(2 * MIB, b"\0") + b"end!" * 1024


@pytest.fixture
def vm(azure: Sandbox, tmp_path: Path) -> bytes:
    """The content of its one disk."""
    file = tmp_path / "os"
    file.write_bytes(CONTENT)
    azure.add_vm("web", file)
    return CONTENT


def opened(azure: Sandbox, **options: Any) -> Source:
    return Source(azure.connection_info(), azure.environment(), transport=azure.transport(), **options)


class Memory:
    """A destination in memory: one disk, which cannot be read back."""

    readable = checkable = far = False
    grains = None

    def __init__(self) -> None:
        self.data = bytearray()
        self.manifest: Manifest | None = None
        self.closed = False

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        self.data = bytearray(self.data[:size].ljust(size, b"\0"))
        if full or self.manifest is None:
            return Manifest.new(size, chunk, disk, ZERO)
        return replace(self.manifest, fresh=False)

    def intend(self, offset: int, length: int) -> None: ...

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def settle(self, manifest: Manifest, first: int, count: int) -> None: ...

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def flush(self) -> None: ...

    def check(self) -> bool | None:
        return None

    def commit(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class MemoryFolder:
    """Such destinations, for all disks of a VM."""

    def __init__(self) -> None:
        self.disks: dict[str, Memory] = {}
        self.vm = ""

    def disk(self, name: str) -> Destination:
        return self.disks.setdefault(name, Memory())

    def names(self) -> list[str]:
        return list(self.disks)

    def claim(self, vm: str) -> None:
        self.vm = vm

    def reserve(self, disks: Collection[str]) -> None: ...

    def stop(self) -> None: ...

    def tell_removed(self, disks: Collection[str]) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> MemoryFolder:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.slow
def test_a_destination_of_ones_own_gets_everything_once_and_then_what_changed(
    azure: Sandbox, vm: bytes, tmp_path: Path
) -> None:
    folder, before = MemoryFolder(), azure.resources()
    with opened(azure) as source:
        first = source.replicate("web", folder)
        assert folder.disks["os"].data == vm
        assert folder.disks["os"].closed
        assert folder.vm.endswith("/web")
        assert first.disks[0].verified is None
        second = source.replicate("web", folder)
    assert (second.disks[0].sent_bytes, second.disks[0].full) == (0, False)
    assert azure.resources() == before


class Counting:
    """A credential of a caller's."""

    def __init__(self, real: Any) -> None:
        self.real, self.scopes = real, list[str]()

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        self.scopes += scopes
        token: AccessToken = self.real.get_token(*scopes, **options)
        return token


def test_a_credential_of_ones_own_signs_in_and_that_of_the_settings_does_not(
    azure: Sandbox, vm: bytes, tmp_path: Path
) -> None:
    info = azure.connection_info()
    connection = Connection.from_json(info)
    transport = azure.transport()
    mine = Counting(
        ClientSecretCredential(
            connection.tenant,
            connection.client_id,
            connection.client_secret,
            authority=profile_for(connection, transport).authority,
            transport=transport,
            disable_instance_discovery=True,
        )
    )
    info["service_principal_credentials"]["client_secret"] = "not that of anybody"
    with Source(info, azure.environment(), transport=azure.transport(), credential=mine) as source:
        assert source.inspect("web").name == "web"
    assert mine.scopes


@pytest.mark.slow
def test_each_event_tells_the_vm_the_disk_and_the_time(azure: Sandbox, vm: bytes, tmp_path: Path) -> None:
    events: list[Event] = []
    with opened(azure, report=events.append) as source:
        source.replicate("web", tmp_path / "images")
    assert {event.vm for event in events} == {"web"}
    assert {event.disk for event in events if isinstance(event, Copied)} == {"os"}
    assert {event.disk for event in events if isinstance(event, Step) and event.name == "verify"} == {"os"}
    times = [event.time for event in events]
    assert None not in times
    assert times == sorted(times, key=lambda time: time.timestamp())  # type: ignore[union-attr]


def when(told: Callable[[Event], bool], then: Callable[[], None]) -> Callable[[Event], None]:
    """A report that does something, once, at an event."""
    done = threading.Event()

    def report(event: Event) -> None:
        if not done.is_set() and told(event):
            done.set()
            then()

    return report


MOMENTS: dict[str, Callable[[Event], bool]] = {
    "at once": lambda event: isinstance(event, Step),
    "while the worker is made": lambda event: isinstance(event, Step) and event.name == "boot worker",
    "at the snapshots": lambda event: isinstance(event, Step) and event.name == "snapshot",
    "while disks are copied": lambda event: isinstance(event, Copied) and event.total > 0,
    "while it is verified": lambda event: isinstance(event, Step) and event.name == "verify",
    "while it cleans up": lambda event: isinstance(event, Step) and event.name == "clean up",
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_cancelling_ends_a_run_and_leaves_nothing(
    azure: Sandbox, vm: bytes, tmp_path: Path, moment: str
) -> None:
    """From another thread, while the run is at work or waits."""
    before = azure.resources()
    source: Source

    def cancel() -> None:
        thread = threading.Thread(target=source.cancel)
        thread.start()
        thread.join()

    with opened(azure, report=when(MOMENTS[moment], cancel)) as source:
        if moment == "while it cleans up":  # all is done by then
            source.replicate("web", tmp_path / "images")
        else:
            with pytest.raises(Cancelled) as raised:
                source.replicate("web", tmp_path / "images")
            assert raised.value.exit_code == 130
            assert raised.value.left_behind == []
        assert azure.resources() == before
        source.replicate("web", tmp_path / "images")  # later calls work
    assert (tmp_path / "images/os.raw").read_bytes() == vm
    assert azure.resources() == before


def test_cancelling_what_does_not_run_is_harmless(azure: Sandbox) -> None:
    with opened(azure) as source:
        source.cancel()
        assert source.list_vms() == []
