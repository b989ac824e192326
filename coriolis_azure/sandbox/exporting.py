"""What tests may change about exports, and what the sandbox remembers of them until it closes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Exporting:
    """The rules of exports, as they are at the moment."""

    # Whether clients are in a network that reaches the private endpoints of disk accesses.
    private_clients: bool = False
    # The most incremental snapshots of a disk in 5 minutes of Azure's time. Azure's is 7; 0 for any number.
    snapshot_rate: int = 0
    # The most incremental snapshots that a disk has at a time.
    most_snapshots: int = 500
    # The most restore points of a VM and mode in an hour of Azure's time.
    restore_point_rate: int = 3
    # Hosts of families that merge a deleted snapshot: until when they refuse, with which status and code.
    merging: dict[str, tuple[float, int, str]] = field(default_factory=dict)
    # When snapshots of a family, or restore points of a VM, were taken.
    taken: dict[str, list[float]] = field(default_factory=dict)

    def count(self, what: str, now: float, seconds: float) -> int:
        """How often `what` was taken in the last `seconds`."""
        self.taken[what] = [moment for moment in self.taken.get(what, ()) if moment > now - seconds]
        return len(self.taken[what])
