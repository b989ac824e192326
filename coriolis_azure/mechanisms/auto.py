"""Each disk is read in the way that is best for it; a worker is there only if one of the disks needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from ..azure.exports import Export
from ..errors import AzureError, DeadlinePassed
from ..events import Notice, Step
from ..machine import cloning, exports
from ..machine.choice import Choice
from ..model import Disk, Machine, Worker
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
    context, direct = target.context, [disk for disk in disks if choices[disk.name].mechanism == SNAPSHOTS]

    def exported(disk: Disk) -> cloning.Exported:
        return "no" if choices[disk.name].mechanism == WORKER else "perhaps"

    taken = freeze(context, resources, machine, disks, exported=exported)
    obstacles = {name: choice.reason for name, choice in choices.items() if choice.mechanism == WORKER}
    outcomes: dict[str, Outcome] = {}
    with ExitStack() as opened:
        contents: dict[str, Export] = {}
        for disk in direct:
            try:
                contents[disk.name] = opened.enter_context(exports.probed(context, disk, taken[disk.name]))
            except (AzureError, DeadlinePassed) as error:
                obstacles[disk.name] = error.message
                context.report(Notice(f"{disk.name} is read by a worker after all: {error.message}"))
        readable = [disk for disk in disks if disk.name in contents]
        if readable:
            context.report(Step("copy", listed(readable)))
            outcomes |= _by_name(readable, snapshots.read(target, readable, contents, target.baselines))
    rest = [disk for disk in disks if disk.name not in outcomes]
    if rest:
        outcomes |= _by_name(rest, hybrid.read(target, resources, worker(rest), rest, taken, obstacles))
    return [outcomes[disk.name] for disk in disks]


def _by_name(disks: Sequence[Disk], outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {disk.name: outcome for disk, outcome in zip(disks, outcomes, strict=True)}
