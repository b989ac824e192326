"""The place of one VM's replica on NBD servers: an export for each disk, and a folder of this host for the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ..errors import InvalidInput, NoReplica
from ..events import Notice, Report, silent
from ..model import Image
from . import statefiles
from .folder import EXPORTS, ImageFolder
from .nbd_medium import NbdMedium
from .nbd_url import Exports


class NbdFolder(ImageFolder):
    """The exports of one VM, exclusively for one run. See Place.

    A missing folder is created, unless it must be `existing`: then it and the exports are only read. `vm`: the name of
    the VM, if it is part of the exports' names; later runs find it in the folder. `adopt`: take over exports that no
    run of ours has written.
    """

    def __init__(
        self,
        exports: Exports,
        report: Report = silent,
        *,
        existing: bool = False,
        adopt: bool = False,
        vm: str = "",
    ) -> None:
        self._known = self._read_name(exports)
        name = self._known or vm
        if exports.needs_vm and not name:
            if existing:
                raise NoReplica(f"{exports.state} holds no state of a replica at {exports.uri}")
            raise InvalidInput(
                f"{exports.uri}: the name of the VM is not known here",
                remedy="Write the name of the exports in the URL: NAME-{disk} instead of {vm}-{disk}.",
            )
        self._exports, self._vm = exports.of_vm(name), name
        self._several = False
        super().__init__(exports.state, report, existing=existing, adopt=adopt)
        if exports.is_in_clear:
            report(
                Notice(
                    f"{self._exports.uri} is not encrypted: the network can read and change what is sent; "
                    "use nbds://, or a tunnel"
                )
            )

    def image(self, disk: str) -> Image | None:
        """None: see HandedOff."""
        del disk
        return None

    @staticmethod
    def _read_name(exports: Exports) -> str:
        try:
            return (
                statefiles.read(exports.state / EXPORTS, ours=False, limit=4096)
                .decode(errors="replace")
                .strip()
            )
        except OSError:  # what is wrong with the folder is told when it is opened
            return ""

    def _take(self) -> None:
        super()._take()
        if not self._known:
            statefiles.replace(self.path / EXPORTS, [f"{self._vm or '-'}\n".encode()])

    def _refuse_other_kind(self) -> None:
        images = self._names(".raw")
        if images or (not self._known and self._names(".raw.manifest")):
            raise InvalidInput(
                f"{self.path} holds images, so it cannot hold the state of exports",
                remedy="Give another folder with --state.",
            )

    def _medium(self, name: str) -> NbdMedium:
        export = self._exports.disk(name)
        return NbdMedium(export, name, self.path, adopt=self._adopt, mark=self._mark, several=self._several)

    def reserve(self, disks: Collection[str]) -> None:
        """See Folder. A server of several of them must tell them apart."""
        servers = Counter(self._exports.disk(name).server for name in disks)
        self._several = any(count > 1 for count in servers.values())
        super().reserve(disks)

    def names(self) -> list[str]:
        """The names of the disks that there is state of."""
        return self._names(".raw.manifest")
