"""Raw images by themselves: each run publishes its disk as soon as it is committed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coriolis_azure.events import Report, silent
from coriolis_azure.replica.file_store import FileStore
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.manifest import Manifest
from coriolis_azure.replica.medium import Medium
from coriolis_azure.replica.replica import Replica
from coriolis_azure.replica.runmark import RunMark

if TYPE_CHECKING:
    from typing_extensions import Self


class Image(Replica):
    """A raw image that is a replica by itself."""

    def __init__(
        self,
        path: Path,
        report: Report = silent,
        medium: Medium | None = None,
        *,
        adopt: bool = False,
        mark: RunMark | None = None,
    ) -> None:
        self.path, self.medium = path, FileMedium(path, adopt=adopt, mark=mark)
        super().__init__(medium or self.medium, report)

    def commit(self, manifest: Manifest) -> None:
        """Commit and publish."""
        super().commit(manifest)
        self.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Device(Image):
    """An image that takes its file for a block device: loop devices are not to be had everywhere."""

    def __init__(self, path: Path, report: Report = silent, *, adopt: bool = False) -> None:
        super().__init__(path, report, adopt=adopt)
        self._medium = self.medium = DeviceMedium(path, adopt=adopt)


class DeviceMedium(FileMedium):
    """The medium of such a device."""

    def _store(self, fd: int, path: Path) -> FileStore:
        store = super()._store(fd, path)
        store.is_device = path == self.path
        return store
