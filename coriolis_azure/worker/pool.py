"""Workers that are kept warm between transfers: made once, deallocated when idle, started in less than a minute.

What belongs to a pool carries the pool's tag instead of a run's, so no sweep takes it for a leftover.
"""

from __future__ import annotations

from dataclasses import replace

from ..azure import names
from ..azure.context import Context
from ..errors import CleanupIncomplete, InvalidInput
from ..events import Step, unfailing
from ..model import Run, Worker, canonical_location
from ..readers import ssh
from ..run import attached_disks, resources
from ..run.journal import Journal
from . import launch, network, sizes

# A healthy worker answers at once; one that was just started takes a minute to boot.
HEALTH_SECONDS = 180.0
# Whatever machine comes next.
_NEEDS = sizes.Needs(disks=4, premium=True)


class Pool:
    """The pool `id` in one subscription, made with the settings of the context's environment."""

    def __init__(self, context: Context, id: str) -> None:
        self.context, self._id = replace(context, report=unfailing(context.report)), id

    def share(self) -> tuple[Run, str]:
        """Make what all workers share; the subnet they are in. Nothing is left when it fails."""
        run = self._run(self._id)
        if self.context.environment.export_network:
            network.check_network(self.context.azure, self.context.environment)
            return run, self.context.environment.export_network
        shared = self._resources(run)
        with shared.undone_on_error():
            return run, network.network(shared)

    def add(self, name: str, subnet: str) -> tuple[Run, Worker]:
        """Boot the worker `name` in `subnet` and wait until it can be reached. Nothing is left when it fails."""
        run = self._run(name)
        made = self._resources(run)
        environment = replace(self.context.environment, export_network=subnet)
        with made.undone_on_error():
            booted = launch.launch(made, _NEEDS, environment, self.context.report)
            ssh.connect(booted, self.context.clock, self.context.report).close()
            return run, booted

    def remove(self, run: Run) -> None:
        """Delete a worker, or what the workers share. CleanupIncomplete names what stayed."""
        stayed = resources.delete(self.context.azure, launch.ids(self._resources(run)), self.context.clock)
        if stayed:
            raise CleanupIncomplete(f"could not delete: {', '.join(stayed)}", left_behind=stayed)

    def start(self, vm: str) -> None:
        """Start a worker that was shut down, without any disk that a dead run has left attached to it."""
        attached_disks.emptied(self.context.azure, vm, self.context.report, self.context.clock)
        self.context.report(Step("start worker", names.name_of(vm)))
        self.context.azure.start(vm)

    def stop(self, vm: str) -> None:
        """Deallocate a worker: it costs no more than its disk."""
        self.context.report(Step("stop worker", names.name_of(vm)))
        self.context.azure.deallocate(vm)

    def check_health(self, reader: Worker) -> None:
        """Raise when a worker cannot be reached or cannot take the agent."""
        with ssh.connect(reader, self.context.clock, self.context.report, HEALTH_SECONDS) as connection:
            connection.try_agent()

    def check_fits(self, location: str) -> None:
        """Raise when the workers cannot read the disks of a machine in `location`."""
        if canonical_location(location) != self.context.environment.location:
            raise InvalidInput(
                f"the pool's workers are in {self.context.environment.location}, the VM is in {location}",
                remedy="Use a pool in the location of the VM: Azure attaches disks only within one location.",
            )

    def _run(self, name: str) -> Run:
        """The run of a worker, or of what all share; names of the orchestrator are long, so their start serves."""
        return Run(
            id=name.replace("-", "")[:12].lower(),
            subscription=self.context.azure.subscription,
            group=self.context.environment.resource_group,
            location=self.context.environment.location,
            zone="",
            instance="",
            pool=self._id,
        )

    def _resources(self, run: Run) -> resources.Resources:
        return resources.Resources(
            self.context.azure, run, Journal(run), self.context.environment.tags, self.context.clock
        )
