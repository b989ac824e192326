"""Pools of workers that are reused: created once, deallocated when idle, started in less than a minute.

Resources of a pool carry the pool's tag instead of a run's, so that no sweep deletes them as orphans once they are
complete. What a killed process has left incomplete goes with the next sweep or with the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..azure import names
from ..azure.context import Context
from ..errors import CleanupIncomplete, InvalidInput
from ..events import Step, unfailing
from ..model import Run, Worker, canonical_location
from ..readers import ssh
from ..run import attached_disks, cleanup, resources
from ..run.journal import Journal
from . import launch, network, sizes

# A healthy worker answers at once; one that was just started takes a minute to boot.
HEALTH_SECONDS = 180.0
# Enough for most machines: those to come are not known yet.
_NEEDS = sizes.Needs(disks=4, premium=True)


class Pool:
    """The pool `id` in one subscription, created with the settings of the context's environment."""

    def __init__(self, context: Context, id: str) -> None:
        self.context, self._id = replace(context, report=unfailing(context.report)), id

    def share(self) -> tuple[Run, str]:
        """Create what all workers share and return it with their subnet. If it fails, nothing is left behind."""
        run = self._run(self._id)
        if self.context.environment.export_network:
            network.check_network(self.context.azure, self.context.environment)
            return run, self.context.environment.export_network
        self._sweep()
        shared = self._resources(run)
        with shared.undone_on_error(), shared.deploying("vnet"):
            return run, network.network(shared)

    def add(self, name: str, subnet: str) -> tuple[Run, Worker]:
        """Boot the worker `name` in `subnet` and wait until it is reachable. If it fails, nothing is left behind."""
        run = self._run(name)
        self._sweep()
        own = self._resources(run)
        environment = replace(self.context.environment, export_network=subnet)
        with own.undone_on_error(), own.deploying():
            worker = launch.launch(own, _NEEDS, environment, self.context.report)
            ssh.connect(worker, self.context.clock, self.context.report).close()
            return run, worker

    def remove(self, run: Run) -> None:
        """Delete a worker. Raises CleanupIncomplete with what could not be deleted."""
        self._delete(launch.ids(self._resources(run)))

    def remove_shared(self, run: Run) -> None:
        """Delete what the workers share, and anything else that is left of the pool; CleanupIncomplete as `remove`."""
        listed = cleanup.of_pool(self.context.azure, run.group, run.pool) if run.pool else []
        self._delete([*launch.ids(self._resources(run)), *listed])

    def _sweep(self) -> None:
        """Delete what dead runs have left, workers of pools whose making was killed among them."""
        cleanup.sweep(self.context, cleanup.DEAD_AFTER, None)

    def _delete(self, ids: Sequence[str]) -> None:
        remaining = resources.delete(self.context.azure, ids, self.context.clock)
        if remaining:
            raise CleanupIncomplete(f"could not delete: {', '.join(remaining)}", left_behind=remaining)

    def start(self, vm: str) -> None:
        """Start a deallocated worker, after detaching any disk that a dead run has left attached."""
        attached_disks.emptied(self.context.azure, vm, self.context.report, self.context.clock)
        self.context.report(Step("start worker", names.name_of(vm)))
        self.context.azure.start(vm)

    def stop(self, vm: str) -> None:
        """Deallocate a worker, so that only its disk is billed."""
        self.context.report(Step("stop worker", names.name_of(vm)))
        self.context.azure.deallocate(vm)

    def check_health(self, reader: Worker) -> None:
        """Raise an error if a worker cannot be reached or cannot run the agent."""
        ssh.asked(ssh.Connection.try_agent, reader, self.context.clock, self.context.report, HEALTH_SECONDS)

    def check_fits(self, location: str) -> None:
        """Raise InvalidInput if the workers cannot read the disks of a VM in `location`."""
        if canonical_location(location) != self.context.environment.location:
            raise InvalidInput(
                f"the pool's workers are in {self.context.environment.location}, the VM is in {location}",
                remedy="Use a pool in the location of the VM: Azure attaches disks only within one location.",
            )

    def _run(self, name: str) -> Run:
        """The `Run` of a worker or of the shared resources; the orchestrator's long names are shortened for its id."""
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
