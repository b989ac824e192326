"""The replica matrix: what happens to disks x what goes wrong x where they are written to.

An episode is a first good run, then rounds: the disks change, a run goes wrong, some of what changed goes back to
what it was, and a good run follows. After each good run every image must be its disk, byte for byte; after the bad
one no manifest may say more than is at the destination.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.events import silent
from coriolis_azure.replica import places
from coriolis_azure.sandbox import Request, Response
from harness.battles import MIB, CommandLine, Plugin, Site, Strike, honest
from harness.writer_targets import HttpsTarget, SshTarget

UNIT = 64 << 10
CHANGES = ("changed", "unchanged", "grown", "added", "removed", "re-created")
FAULTS = (
    *("kill", "cut", "damaged bytes", "destination full", "destination error", "destination killed"),
    *("worker rebooted", "worker deleted", "clone slow"),
)
# What the run itself survives.
SURVIVED = {"cut", "damaged bytes", "worker rebooted", "clone slow"}
MOST = 4 * MIB


@dataclass
class Figures:
    """What was tried and what was wrong."""

    runs: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    ended_by_fault: int = 0
    images: int = 0
    wrong: list[str] = field(default_factory=list)


class Device(CommandLine):
    """Images that are block devices of this machine: loop devices over files."""

    name = "block device"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._loops: list[str] = []
        folder = Path(self.to)
        folder.mkdir()
        for disk in ("os", "data-0", "data-1", "data-2"):
            backing = site.folder / f"{disk}.backing"
            backing.write_bytes(bytes(MIB) + b"\xee" * (MOST - 2 * MIB) + bytes(MIB))
            done = subprocess.run(
                ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True
            )
            if done.returncode:
                self.close()
                raise OSError(done.stderr.strip())
            self._loops.append(done.stdout.strip())
            (folder / f"{disk}.raw").symlink_to(self._loops[-1])

    def close(self) -> None:
        """Give the devices back."""
        for loop in self._loops:
            subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)


class Writer(Plugin):
    """The plugin, whose volumes are behind one of the orchestrator's writers."""

    kind: type[SshTarget | HttpsTarget]

    def __init__(self, site: Site) -> None:
        self._made = 0
        self._site_folder = site.folder
        super().__init__(site)
        self.renew()

    def renew(self) -> None:
        """Another target for the same volumes, as a destination plugin deploys one for each execution."""
        self._made += 1
        self.server = self.kind(self._site_folder / f"target-{self._made}")
        self.target = json.loads(json.dumps(self.server.info))

    def close(self) -> None:
        """End the target."""
        with suppress(OSError):
            self.server.close()


class OverSsh(Writer):
    name = "SSH writer"
    kind = SshTarget


class OverHttps(Writer):
    name = "HTTPS writer"
    kind = HttpsTarget


class Files(Plugin):
    name = "file writer"

    def close(self) -> None:
        """Nothing is open."""


class Folder(CommandLine):
    name = "image folder"

    def close(self) -> None:
        """Nothing is open."""


class Container(CommandLine):
    """VHDs in Blob storage."""

    name = "Blob storage"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.to = "blob://sandboxstorage/replicas/web"

    def images(self) -> dict[str, Path]:
        """The VHDs, read into files, by disk."""
        inside = self.site.azure.storage
        found = {}
        for disk in self.site.disks():
            blob = inside.blob(f"sandboxstorage/replicas/web/{disk}.vhd")
            if blob is not None:
                found[disk] = self.site.folder / f"{disk}.vhd"
                found[disk].write_bytes(inside.content(blob))
        return found

    def ahead(self) -> list[str]:
        """The VHDs whose manifest says more than they hold."""
        with places.open(str(self.to), silent, self.site.owner.storage) as place:
            return [name for name in self.images() if not honest(place.disk(name))]

    def clean(self) -> list[str]:
        """What the next run does first; the leases of a dead one have run out by then."""
        self.site.azure.storage.end_leases()
        return super().clean()

    def close(self) -> None:
        """Nothing is open."""


FRONTS = {each.name: each for each in (Folder, Device, Container, Files, OverSsh, OverHttps)}
Front = Folder | Device | Container | Files | OverSsh | OverHttps


def possible(front: Front) -> list[str]:
    """The faults that can be provoked there."""
    local = not isinstance(front, Writer)
    excluded = {"destination killed"} if local else {"destination full", "destination error"}
    if isinstance(front, Device):
        excluded.add("destination full")
    if isinstance(front, Container):  # their faults are Azure's: test_blob.py
        excluded |= {"destination full", "destination error"}
    return [fault for fault in FAULTS if fault not in excluded]


@contextmanager
def opened(kind: type[Front], folder: Path) -> Iterator[Front]:
    """A front on a site of its own."""
    with Site(folder) as site:
        front = kind(site)
        try:
            yield front
        finally:
            front.close()


def episode(front: Front, rounds: list[str], figures: Figures, chance: random.Random) -> None:
    """A first good run, then a round for each fault."""
    good_run(front, figures)
    for fault in rounds:
        older = front.site.disks()
        change(front.site, figures, chance)
        size = changed_bytes(older, front.site.disks())
        faulty_run(front, fault, chance.randrange(2000, 10_000 + size), figures, chance)
        go_back(front.site, older, figures, chance)
        good_run(front, figures)


def good_run(front: Front, figures: Figures) -> None:
    """A run in which nothing fails; all images are their disks then."""
    front.site.ill = ("", 0)
    front.site.relay.quiet()
    code = front.replicate()
    figures.runs += 1
    if code:
        tell(front, figures, f"a good run ended with {code}")
    compare(front, figures, "after a good run")


def changed_bytes(older: dict[str, bytes], now: dict[str, bytes]) -> int:
    """How much of the disks is not as it was, in blocks of 4 KiB."""
    return sum(
        4096
        for name, content in now.items()
        for at in range(0, len(content), 4096)
        if content[at : at + 4096] != older.get(name, b"")[at : at + 4096]
    )


def faulty_run(front: Front, fault: str, at: int, figures: Figures, chance: random.Random) -> None:
    """A run in which `fault` happens, once `at` bytes have come from the worker where that matters."""
    figures.runs += 1
    figures.faults[fault] += 1
    strike = None
    front.site.ill = ("slow", 0)
    relay = front.site.relay
    relay.blocked = chance.random() < 0.5
    figures.ways["over SSH" if relay.blocked else "past SSH"] += 1
    if fault == "kill":
        strike = Strike("data", at, signal.SIGKILL)
    elif fault == "destination full":
        front.site.ill = ("full", chance.randrange(UNIT, MIB))
    elif fault == "destination error":
        front.site.ill = ("error", chance.randrange(8))
    acts: dict[str, Callable[[], None]] = {
        "cut": relay.cut,
        "damaged bytes": relay.damage,
        "worker rebooted": lambda: aside(lambda: restart(front.site)),
        "worker deleted": lambda: delete_worker(front.site),
    }
    if isinstance(front, Writer):
        acts["destination killed"] = lambda: aside(front.server.kill)
    intercept = front.site.azure.intercept
    assert intercept is not None  # the site's own
    if fault == "clone slow":
        front.site.azure.intercept = slow_snapshots(intercept)
    code = front.replicate(strike, at=(at, acts[fault]) if fault in acts else None)
    front.site.azure.intercept = intercept
    front.site.ill = ("", 0)
    relay.quiet()
    relay.blocked = True
    figures.ended_by_fault += code != 0
    if code and fault in SURVIVED:
        tell(front, figures, f"a run with {fault} ended with {code}")
    if not code:
        compare(front, figures, f"after a run with {fault}")
    front.clean()
    if not isinstance(front, Writer):
        for name in front.ahead():
            tell(front, figures, f"the manifest of {name} says more than is there after {fault}")
    if isinstance(front, Writer):
        front.close()
        front.renew()


def aside(act: Callable[[], object]) -> None:
    """Do it in a thread of its own, whether it succeeds or not."""

    def quietly() -> None:
        with suppress(errors.CoriolisAzureError, OSError):
            act()

    threading.Thread(target=quietly, daemon=True, name="relay").start()


def restart(site: Site) -> None:
    """Somebody reboots the worker."""
    for vm in workers(site):
        site.owner.azure._operations("vm").begin_restart(names.group_of(vm), names.name_of(vm))


def delete_worker(site: Site) -> None:
    """Somebody deletes the worker."""
    site.relay.refuse = 1 << 30
    with suppress(errors.CoriolisAzureError):
        for vm in workers(site):
            site.owner.azure.delete(vm)


def workers(site: Site) -> list[str]:
    listed = site.owner.azure.resources("vm", "sandbox")
    return [vm["id"] for vm in listed if names.RUN_TAG in (vm.get("tags") or {})]


def slow_snapshots(intercept: Callable[..., Response]) -> Callable[..., Response]:
    """Azure takes its time to fill snapshots: the first two looks at each show them incomplete."""
    looks: Counter[str] = Counter()

    def answer(request: Request, then: Callable[[Request], Response]) -> Response:
        response = intercept(request, then)
        if "/snapshots/coriolis" in request.path and request.method in ("GET", "PUT") and response.body:
            document = json.loads(response.body)
            looks[request.path] += 1
            if looks[request.path] < 4 and "properties" in document:
                document["properties"]["completionPercent"] = 25.0 * looks[request.path]
                return replace(response, body=json.dumps(document).encode())
        return response

    return answer


def change(site: Site, figures: Figures, chance: random.Random) -> None:
    """Something happens to every disk, and now and then to the list of disks."""
    for name, content in site.disks().items():
        what = chance.choice(("changed", "changed", "unchanged", "grown"))
        if what == "grown" and len(content) + UNIT > MOST // 2:
            what = "changed"
        figures.changes[what] += 1
        if what == "grown":
            content += chance.randbytes(chance.randrange(1, UNIT // 512) * 512)
        if what != "unchanged":
            site.write(name, edited(content, chance))
    what = chance.choice(("added", "removed", "re-created", ""))
    data = [name for name in site.disks() if name != "os"]
    free = [name for name in ("data-0", "data-1", "data-2") if name not in data]
    if what == "added" and free:
        site.attach(free[0], chance.randbytes(MIB))
    elif what == "removed" and data:
        site.detach(chance.choice(data))
    elif what == "re-created" and data:
        name = chance.choice(data)
        size = len(site.disks()[name])
        site.detach(name)
        site.attach(name, chance.randbytes(max(size, MIB)))
    else:
        return
    figures.changes[what] += 1


def edited(content: bytes, chance: random.Random) -> bytes:
    """Content with some pieces that are new, or zeros."""
    new = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        length = chance.choice((512, 4096, UNIT, 4 * UNIT))
        start = chance.randrange(len(new))
        piece = chance.choice((chance.randbytes(length), bytes(length)))
        new[start : start + length] = piece[: len(new) - start]
    return bytes(new)


def go_back(site: Site, older: dict[str, bytes], figures: Figures, chance: random.Random) -> None:
    """Some disks get back what they held before the run that went wrong: all of it, or some chunks."""
    for name, now in site.disks().items():
        before = older.get(name)
        if before is None or before == now or chance.random() < 0.3:
            continue
        new = bytearray(now)
        for start in range(0, len(before), UNIT):
            if chance.random() < 0.7:
                new[start : min(start + UNIT, len(before))] = before[start : start + UNIT]
        figures.changes["changed back"] += 1
        site.write(name, bytes(new))


def compare(front: Front, figures: Figures, when: str) -> None:
    images = front.images()
    for name, content in front.site.disks().items():
        figures.images += 1
        path = images[name]
        with path.open("rb") as file:
            if file.read(len(content)) != content:
                tell(front, figures, f"{when} the image of {name} is wrong")


def tell(front: Front, figures: Figures, what: str) -> None:
    log = (front.site.folder / "log").read_text()[-2500:]
    figures.wrong.append(f"{front.name}: {what}\n{log}")
