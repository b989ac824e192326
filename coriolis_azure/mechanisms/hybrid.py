"""A worker reads clones of the disks, but only what Azure lists as allocated or changed.

Through signed URLs this process reads nothing but these lists. A disk of which Azure gives none is read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import AzureError, DeadlinePassed
from ..machine import cloning, exports
from ..model import Disk, Json, Machine, Worker
from ..readers.plan import Known
from ..replica.destinations import Destination
from ..replica.manifest import Manifest
from ..run.resources import Resources
from ..settings import HYBRID
from ..transfer import Outcome
from .freezing import freeze
from .snapshots import ListedDisk, grains_of
from .target import Read, Target
from .worker import ByWorker, cloned, while_booting


def copy(
    target: Target, resources: Resources, boot: Callable[[], Worker], machine: Machine, disks: Sequence[Disk]
) -> list[Outcome]:
    """Copy managed disks: freeze all while the worker boots, clone them, and read of the clones what Azure lists."""
    context = target.context
    obstacles = exports.obstacles(context, disks)

    def wanted(disk: Disk) -> cloning.Exported:
        return "no" if obstacles[disk.name] else "perhaps"

    worker, snapshots = while_booting(
        target, boot, lambda: freeze(context, resources, machine, disks, exported=wanted)
    )
    return read(target, resources, worker, disks, snapshots, obstacles)


def read(
    target: Target,
    resources: Resources,
    worker: Worker,
    disks: Sequence[Disk],
    snapshots: Mapping[str, Json],
    obstacles: Mapping[str, str],
) -> list[Outcome]:
    """Clone disks from their snapshots, and read what Azure lists. `obstacles`: why it gives no lists of some disks."""
    lists = Lists(target, snapshots, obstacles, exports.exported)
    try:
        by_worker = ByWorker(target, resources, worker, lists.known)
        return by_worker.copy(disks, cloned(target.context, resources, snapshots))
    finally:
        target.read |= lists.read()


class Lists:
    """What Azure lists of the snapshots of a VM's disks, or why it does not. For threads, one a disk."""

    def __init__(
        self,
        target: Target,
        snapshots: Mapping[str, Json],
        obstacles: Mapping[str, str],
        exported: exports.Exporter,
    ) -> None:
        self._target, self._snapshots, self._obstacles = target, snapshots, obstacles
        self._exported = exported
        self._disks: dict[str, ListedDisk] = {}

    def known(self, disk: Disk, destination: Destination) -> Callable[[Manifest], Known]:
        """What tells a reader of a disk what is known of it, now that `destination` knows what it holds."""
        context = self._target.context
        state = self._disks.setdefault(disk.name, ListedDisk(context, disk, self._exported))
        state.prepare(destination, self._target.baselines)

        def known(base: Manifest) -> Known:
            try:
                return self._listed(state, disk, destination, base)
            except (AzureError, DeadlinePassed) as error:
                return state.unlisted(error.message)

        return known

    def _listed(self, state: ListedDisk, disk: Disk, destination: Destination, base: Manifest) -> Known:
        """Have Azure make its lists; the access to the snapshot ends before the agent reads anything."""
        context, snapshot = self._target.context, self._snapshots[disk.name]
        if why_not := self._obstacles.get(disk.name) or cloning.why_closed(snapshot):
            return state.unlisted(why_not)
        with exports.opened(context, [disk], self._snapshots, self._exported) as contents:
            state.look(contents[disk.name])
            changed = state.changed(base)
            return Known(state.extents(base.size), changed, grains_of(destination))

    def read(self) -> dict[str, Read]:
        """What was read of each disk, by name."""
        return {name: state.read(HYBRID) for name, state in self._disks.items()}
