"""Each disk is read in the way that is best for it; a worker is there only if one of the disks needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from ..azure.context import Context
from ..azure.exports import Export
from ..errors import AzureError, DeadlinePassed
from ..events import Notice, Step
from ..machine import cloning, exports
from ..machine.choice import Choice
from ..model import Disk, Json, Machine, Worker
from ..run.resources import Resources
from ..settings import SNAPSHOTS, WORKER
from ..transfer import Outcome
from . import hybrid, snapshots
from .freezing import freeze
from .target import Target, listed


def copy(
    target: Target,
    resources: Resources,
    machine: Machine,
    disks: Sequence[Disk],
    choices: dict[str, Choice],
    worker: Callable[[Sequence[Disk]], Worker],
) -> list[Outcome]:
    """Copy managed disks as chosen. A disk whose snapshot cannot be read after all is read by a worker.

    `worker` gives the worker, which it launches for these disks if the run has none yet.
    """
    context = target.context

    def exported(disk: Disk) -> cloning.Exported:
        return "no" if choices[disk.name].mechanism == WORKER else "perhaps"

    taken = freeze(context, resources, machine, disks, exported=exported)
    obstacles = {name: choice.reason for name, choice in choices.items() if choice.mechanism == WORKER}
    outcomes: dict[str, Outcome] = {}
    direct = [disk for disk in disks if choices[disk.name].mechanism == SNAPSHOTS]
    with _readable(context, direct, taken, obstacles) as contents:
        if near := [disk for disk in direct if disk.name in contents]:
            context.report(Step("copy", listed(near)))
            outcomes |= _by_name(near, snapshots.read(target, near, contents, target.baselines))
    if rest := [disk for disk in disks if disk.name not in outcomes]:
        outcomes |= _by_name(rest, hybrid.read(target, resources, worker(rest), rest, taken, obstacles))
    return [outcomes[disk.name] for disk in disks]


@contextmanager
def _readable(
    context: Context, disks: Sequence[Disk], taken: Mapping[str, Json], obstacles: dict[str, str]
) -> Iterator[dict[str, Export]]:
    """The content of those snapshots that can be read, by disk name. Why others cannot is added to `obstacles`."""
    contents: dict[str, Export] = {}
    with ExitStack() as opened:
        for disk in disks:
            try:
                contents[disk.name] = opened.enter_context(exports.probed(context, disk, taken[disk.name]))
            except (AzureError, DeadlinePassed) as error:
                obstacles[disk.name] = error.message
                context.report(Notice(f"{disk.name} is read by a worker after all: {error.message}"))
        yield contents


def _by_name(disks: Sequence[Disk], outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {disk.name: outcome for disk, outcome in zip(disks, outcomes, strict=True)}
