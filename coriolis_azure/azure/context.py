"""The context that every step of a run gets: one value instead of five parameters."""

from __future__ import annotations

from dataclasses import dataclass

from ..clock import Clock
from ..events import Report
from ..settings import Environment
from .blobs import Storage
from .client import Azure


@dataclass(frozen=True)
class Context:
    """One Azure subscription with its Blob storage, the source environment, the clock and the event sink."""

    azure: Azure
    storage: Storage
    environment: Environment
    clock: Clock
    report: Report

    @classmethod
    def of(cls, azure: Azure, environment: Environment, clock: Clock, report: Report) -> Context:
        """The context for an environment in one subscription."""
        storage = Storage(
            azure,
            environment.resource_group,
            clock,
            place=(environment.storage_account_name, environment.storage_container_name),
            by_key=environment.storage_use_account_key,
        )
        return cls(azure, storage, environment, clock, report)
