"""How many incremental snapshots a disk may have, and how fast they may be taken. Texts are the sandbox's own."""

from __future__ import annotations

from coriolis_azure.sandbox.relations import SNAPSHOTS
from coriolis_azure.sandbox.wire import not_allowed
from coriolis_azure.sandbox.world import World

_PERIOD = 300


def count(world: World, family: str) -> None:
    """Count an incremental snapshot that is about to be taken, or refuse it."""
    rules = world.exporting
    existing = sum(
        snapshot.properties.get("incrementalSnapshotFamilyId") == family
        for snapshot in world.state.of_type(SNAPSHOTS)
    )
    if existing >= rules.most_snapshots:
        raise not_allowed(
            f"The disk has {existing} incremental snapshots, which is the most that it may have."
        )
    taken = rules.count(family, world.seconds(), _PERIOD)
    if rules.snapshot_rate and taken >= rules.snapshot_rate:
        raise not_allowed(
            f"{taken} incremental snapshots of the disk were taken within {_PERIOD} seconds. Please retry later."
        )
    rules.taken[family].append(world.seconds())
