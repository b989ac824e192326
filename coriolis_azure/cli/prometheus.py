"""The state of replicas as metrics, in the text format that node_exporter's textfile collector reads.

The names and labels are stable: docs/howto/schedules.md lists them. A metric without a value is left out, so that an
alert on its absence works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import count

from ..clock import moment
from ..errors import cleaned
from ..replica.survey import Surveyed

Value = float | int | bool | None


def _time(text: str | None) -> float | None:
    found = moment(text) if text else None
    return found.timestamp() if found else None


def _ended(one: Surveyed) -> float | None:
    last = one.history.last
    began = _time(last.started) if last else None
    return began + last.seconds if last and began is not None else None


# Name, meaning, value. All are gauges.
METRICS: tuple[tuple[str, str, Callable[[Surveyed], Value]], ...] = (
    ("readable", "1 if the state of the replica can be read, else 0.", lambda one: not one.error),
    (
        "complete",
        "1 if the replica has a point in time and all of its images are there, else 0.",
        lambda one: one.point is not None and not one.missing and not one.error,
    ),
    ("point_timestamp_seconds", "The last good point in time.", lambda one: _time(one.point)),
    ("points", "Earlier points in time that are kept.", lambda one: None if one.error else len(one.points)),
    ("size_bytes", "The size of the disks of the VM.", lambda one: one.size_bytes),
    (
        "stored_bytes",
        "What the replica takes up, with its state and earlier points.",
        lambda one: one.stored_bytes,
    ),
    (
        "verified_timestamp_seconds",
        "When all of the replica was last read and compared.",
        lambda one: _time(one.verified.time) if one.verified else None,
    ),
    ("running", "1 if a run is in progress, else 0.", lambda one: one.running),
    (
        "unfinished",
        "1 if the last run did not succeed and none is in progress, else 0.",
        lambda one: None if one.error else one.state in ("unfinished", "incomplete"),
    ),
    (
        "last_run_success",
        "1 if the last run that ended succeeded, else 0.",
        lambda one: one.history.last.outcome == "done" if one.history.last else None,
    ),
    ("last_run_timestamp_seconds", "When the last run ended.", _ended),
    (
        "last_run_seconds",
        "How long the last run took.",
        lambda one: one.history.last.seconds if one.history.last else None,
    ),
    (
        "last_run_sent_bytes",
        "What the last run sent.",
        lambda one: one.history.last.sent_bytes if one.history.last else None,
    ),
)
PREFIX = "coriolis_azure_replica_"


def text(replicas: Iterable[Surveyed], now: datetime) -> str:
    """All metrics of these replicas."""
    found = list(replicas)
    labels = _labels(found)
    lines = []
    for name, meaning, value in METRICS:
        samples = [
            (each, number)
            for each, one in zip(labels, found, strict=True)
            if (number := value(one)) is not None
        ]
        lines += _described(f"{PREFIX}{name}", meaning)
        lines += [f"{PREFIX}{name}{{{each}}} {_number(number)}" for each, number in samples]
    for name, meaning, number in (
        ("coriolis_azure_replicas", "Replicas at the destination.", float(len(found))),
        ("coriolis_azure_status_timestamp_seconds", "When this file was written.", now.timestamp()),
    ):
        lines += [*_described(name, meaning), f"{name} {_number(number)}"]
    return "\n".join(lines) + "\n"


def _described(name: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]


def _labels(found: Iterable[Surveyed]) -> list[str]:
    """Which replica each is: its folder, or the VM's name if the destination is that of one VM.

    Two samples with the same labels would make the collector refuse the file.
    """
    labels: dict[str, None] = {}
    for one in found:
        name = one.name or one.vm_name
        texts = (f"{name} ({number})" if number > 1 else name for number in count(1))
        labels[next(label for label in (_label(one, text) for text in texts) if label not in labels)] = None
    return list(labels)


def _label(one: Surveyed, name: str) -> str:
    values = {"replica": name, "vm": one.vm_name, "resource_group": one.group}
    return ",".join(f'{label}="{_escaped(value)}"' for label, value in values.items())


def _escaped(value: str) -> str:
    return cleaned(value).replace("\\", r"\\").replace('"', r"\"")


def _number(number: float) -> str:
    """Without an exponent or rounding, as far as that is possible."""
    return str(int(number)) if number == int(number) else f"{number:.3f}"
