"""The subject of the checks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..azure.context import Context
from ..errors import InvalidInput
from ..model import Disk, Machine
from ..settings import SNAPSHOTS
from ..worker.network import subnet_id


@dataclass(frozen=True)
class Subject:
    """An environment and, if one is named and can be read, a VM with its disks to copy.

    `uses` and `may_use` are features of `permissions` that the caller chooses, or may choose later. `strict` requires
    every permission in `permissions.role`.
    """

    context: Context
    machine: Machine | None = None
    disks: tuple[Disk, ...] = ()
    uses: Collection[str] = ()
    may_use: Collection[str] = ()
    strict: bool = False

    @property
    def subscription(self) -> str:
        """The ARM id of the subscription."""
        return f"/subscriptions/{self.context.azure.subscription}"

    @property
    def group(self) -> str:
        """The ARM id of the resource group."""
        return f"{self.subscription}/resourceGroups/{self.context.environment.resource_group}"

    @property
    def uses_worker(self) -> bool:
        """Whether a worker may be needed."""
        return self.context.environment.replica_export_mechanism != SNAPSHOTS

    @property
    def subnet(self) -> str | None:
        """The ARM id of the subnet of the settings; None if they name none, which `network` reports."""
        try:
            return subnet_id(self.context.azure.subscription, self.context.environment)
        except InvalidInput:
            return None
