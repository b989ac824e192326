"""Moves a VM for good with the shortest outage: nearly everything is copied while it still runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from .events import Notice
from .model import Json
from .replica.verification import Verdict
from .results import Replicated
from .source import Source

# How long Azure usually takes to shut a VM down and release its host.
DEALLOCATION_SECONDS = 60.0


@dataclass(frozen=True)
class Cutover:
    """The result of a cutover.

    `runs`: the first, while the VM runs; a second, of what changed during the first; the last, after the shutdown.
    `predicted_seconds` and `outage_seconds`: the expected and the real time from the shutdown until the replica was
    complete. `verdicts`: the result of verifying the replica afterwards.
    """

    vm: str
    runs: tuple[Replicated, ...]
    predicted_seconds: float
    outage_seconds: float
    verdicts: tuple[Verdict, ...]

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


def cut_over(source: Source, vm: str, to: str | Path, *, adopt: bool = False, full: bool = False) -> Cutover:
    """Replicate `vm` twice while it runs, deallocate it, replicate what is left, and verify the replica.

    The VM stays deallocated. `full`: the last run reads everything, whatever Azure says has changed; that takes longer.
    Raises what `Source.replicate` and `Source.verify` raise. If one of the first two runs fails, the VM keeps running.
    """
    report = source.context.report
    first = source.replicate(vm, to, adopt=adopt)
    second = source.replicate(vm, to)
    predicted = round(second.copy_seconds + DEALLOCATION_SECONDS, 3)
    report(Notice(f"shutting {second.vm} down; the outage is expected to take about {predicted:.0f} seconds"))
    last = source.replicate(vm, to, shutdown=True, full=full)
    return Cutover(
        vm=last.vm,
        runs=(first, second, last),
        predicted_seconds=predicted,
        outage_seconds=last.outage_seconds or 0.0,
        verdicts=_verified(source, last.vm, to),
    )


def _verified(source: Source, vm: str, to: str | Path) -> tuple[Verdict, ...]:
    """The verdicts; if they cannot be had, it is reported what has been done all the same."""
    try:
        return tuple(source.verify(to))
    except BaseException:
        source.context.report(
            Notice(f"{vm} is off, and its replica is complete: run `coriolis-azure verify` to verify it")
        )
        raise
