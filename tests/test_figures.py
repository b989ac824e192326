"""The limits and sizes that pages state are those of the code."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coriolis_azure import cutover, fleet
from coriolis_azure.agent import wire
from coriolis_azure.azure import exports, pace, patience
from coriolis_azure.checks import plan
from coriolis_azure.machine import libvirt
from coriolis_azure.mechanisms import snapshots
from coriolis_azure.mechanisms import vhds as imported
from coriolis_azure.plugin import claims, provider, ssh_writer
from coriolis_azure.readers import agents, changed, channel, flow, pages, ssh
from coriolis_azure.replica import (
    comparison,
    digests,
    draft,
    history,
    manifest,
    nbd_store,
    nbd_url,
    runmark,
    vhds,
)
from coriolis_azure.run import cleanup, lifetime, resources, stalled
from coriolis_azure.sandbox.sandbox import PACE
from coriolis_azure.settings import Environment
from coriolis_azure.worker import launch, sizes

DOCS = Path(__file__).parent.parent / "docs"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NEAR: Any = SimpleNamespace(far=False)  # as much of a destination as `in_flight` looks at
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def number(value: float) -> str:
    """A small number as a word."""
    assert value == int(value)
    return NUMBERS[int(value)]


def minutes(seconds: float) -> str:
    """A time as pages write it: `a minute`, `five minutes`, `15 minutes`."""
    count = seconds / 60
    if count == 1:
        return "a minute"
    return f"{number(count) if count <= 10 else format(count, '.0f')} minutes"


def most_chunks(disks: range) -> int:
    """The most chunks of a disk that the host holds while so many are copied."""
    return max(comparison.in_flight(NEAR, chunk, count)[1] for chunk, count in copies() if count in disks)


def most_bytes() -> int:
    """The most bytes of chunks that the host holds while it copies."""
    return max(count * chunk * comparison.in_flight(NEAR, chunk, count)[1] for chunk, count in copies())


def copies() -> Iterator[tuple[int, int]]:
    """Each size of chunks, with each number of disks that a worker reads at a time."""
    for chunk in (1 << bit for bit in range(12, wire.MAX_CHUNK.bit_length())):
        for disks in range(1, sizes.at_a_time([1] * 9, chunk) + 1):
            yield chunk, disks


def from_snapshots(chunk_kib: int) -> str:
    """How many disks are read from snapshots at a time."""
    context: Any = SimpleNamespace(environment=SimpleNamespace(chunk_size_kib=chunk_kib))
    contents: Any = dict.fromkeys(map(str, range(9)))
    unused: Any = None
    return number(snapshots.SnapshotReading(context, contents, unused, unused, unused).concurrent)


SETTINGS = Environment.from_json({"location": "westeurope", "resource_group": "group"})
CHUNK, DATA_PORT = SETTINGS.chunk_size_kib, SETTINGS.export_worker_data_port
DEAD = number(cleanup.DEAD_AFTER.total_seconds() / 3600)
UNFINISHED = minutes(cleanup._UNFINISHED_DEAD_AFTER.total_seconds())
LINE = [8 * rate / 10**6 for rate in plan._UNKNOWN_LINE]  # in Mbit/s
PERFORMANCE = "explanation/performance.md"
ARCHITECTURE = "explanation/architecture.md"
RELIABILITY = "explanation/reliability.md"
SNAPSHOTS = "explanation/snapshots.md"
PLUGIN = "reference/coriolis.md"
USAGE = "reference/usage.md"

# A page, and a part of a sentence in it that states what the code says.
STATED = [
    (PERFORMANCE, f"keyed with {manifest.KEY} random bytes"),
    (PERFORMANCE, f"at most {wire.GRAIN // 16 + 1} of 2^128 keys"),
    (PERFORMANCE, f"We keep {8 * wire.DIGEST} of them"),
    (PERFORMANCE, f"A digest has {wire.DIGEST} bytes. The digests of 1 TiB, with chunks of 1 MiB, are "),
    (PERFORMANCE, f" are {wire.DIGEST * 4 / 3:.1f} MiB of base64 text"),
    (PERFORMANCE, f"A worker reads {number(sizes.at_a_time([0] * 9, MIB))} disks at a time."),
    (PERFORMANCE, f"it reads up to {number(sizes.at_a_time([1] * 9, MIB))}: as many as add up to"),
    (PERFORMANCE, f"as many as add up to {sizes.ENOUGH // MIB} MiB/s"),
    (PERFORMANCE, f"If chunks are larger than 1 MiB, it reads {number(sizes.at_a_time([1] * 9, 2 * MIB))}."),
    (PERFORMANCE, f"up to {number(most_chunks(range(1, 2)))} chunks if one disk is copied"),
    (PERFORMANCE, f"up to {number(most_chunks(range(2, 9)))} of each if there are several"),
    (PERFORMANCE, f"if there are several: {most_bytes() // MIB} MiB at most"),
    (PERFORMANCE, f"another {ssh.WINDOW // MIB} MiB may be in flight"),
    (PERFORMANCE, f"up to {comparison._FAR_THREADS} writes in flight"),
    (PERFORMANCE, f"{from_snapshots(1024)} disks are read at a time, {from_snapshots(512)} if chunks are smaller"),
    (PERFORMANCE, f"and {from_snapshots(2048)} if they are larger"),
    (PERFORMANCE, f"reads ahead by {pages.AHEAD // MIB} MiB"),
    (PERFORMANCE, f"starts with {pace._FIRST} for each disk, grows to at most {exports._MOST_READS}"),
    (PERFORMANCE, f"{wire.DIGEST} bytes per chunk, {wire.DIGEST} MiB per TiB with chunks of 1 MiB"),
    (PERFORMANCE, f"the first {digests.PAGE * digests._IN_MEMORY:,} chunks"),
    (PERFORMANCE, f"If nothing arrives for {number(flow._QUIET_SECONDS)} seconds"),
    (PERFORMANCE, f"Keys are renegotiated every {ssh._REKEY_BYTES // GIB} GiB"),
    (PERFORMANCE, f"so {number(ssh_writer.RECEIVERS)} sessions of one connection share a disk"),
    (ARCHITECTURE, f"*chunk* ({CHUNK // KIB} MiB by default)"),
    (ARCHITECTURE, f"*grains* ({wire.GRAIN // KIB} KiB)"),
    (ARCHITECTURE, f"*leaves* ({SETTINGS.leaf_size_kib} KiB by default)"),
    (
        ARCHITECTURE,
        f"| {CHUNK // KIB} MiB, {wire.GRAIN // KIB} KiB and {SETTINGS.leaf_size_kib} KiB of a disk by default",
    ),
    (ARCHITECTURE, f"| block | {draft.BLOCK // KIB} KiB of a disk"),
    (ARCHITECTURE, f"`os.raw.grains`, {wire.DIGEST * MIB // wire.GRAIN} MiB per TiB"),
    (ARCHITECTURE, f"not acknowledged for {minutes(ssh._DEAD_SECONDS)} is dead"),
    (ARCHITECTURE, f"to the worker takes {channel._NEAR_SECONDS * 1000:.0f} ms or more"),
    (ARCHITECTURE, f"over up to {number(channel._MOST)} connections"),
    (ARCHITECTURE, f"waits up to {minutes(ssh.RECONNECT_SECONDS)} for the worker"),
    (ARCHITECTURE, f"{number(agents._FRUITLESS).title()} connections in a row that settle nothing"),
    (ARCHITECTURE, f"which blocks of {draft.BLOCK // KIB} KiB the draft holds"),
    (ARCHITECTURE, f"after each {comparison._EARLY_BYTES // MIB} MiB, a thread flushes"),
    (ARCHITECTURE, f"{'twice' if runmark._SECONDS == 0.5 else '?'} a second while it writes"),
    (ARCHITECTURE, f"it waits {number(runmark._FENCE_SECONDS)} seconds, reads everything"),
    (ARCHITECTURE, f"that is retried for {minutes(resources.PATIENCE_SECONDS)}"),
    (ARCHITECTURE, f"updates a tag on its NSG every {minutes(lifetime._LIFE_SECONDS)}"),
    (ARCHITECTURE, f"dead after {DEAD} hours of silence"),
    (ARCHITECTURE, f"{UNFINISHED} are enough"),
    (ARCHITECTURE, f"dead after {stalled.STALLED_SECONDS:.0f} seconds"),
    (ARCHITECTURE, f"as fast as they deliver (up to {sizes.ENOUGH // MIB} MiB/s)"),
    (ARCHITECTURE, f"The VM is requested up to {number(launch.TRIES)} times"),
    (RELIABILITY, f"noticed within {ssh._DEAD_SECONDS + ssh._KEEPALIVE_SECONDS} seconds"),
    (RELIABILITY, f"a worker is waited for up to {ssh.RECONNECT_SECONDS / 60:.0f} minutes"),
    (RELIABILITY, f"{patience.REQUEST_SECONDS / 60:.0f} minutes for a request with its retries"),
    (RELIABILITY, f"{patience.OPERATION_SECONDS / 60:.0f} for an operation"),
    (RELIABILITY, f"{patience.LISTING_SECONDS / 60:.0f} and {patience.PAGES:,} pages for a listing"),
    (RELIABILITY, f"{minutes(resources.PATIENCE_SECONDS)} of retries"),
    (RELIABILITY, f"one part in {changed.WINDOW} read in each run"),
    (SNAPSHOTS, f"`baseline_days` ({SETTINGS.baseline_days}) is"),
    (SNAPSHOTS, f"after every `full_every` ({SETTINGS.full_every}) runs"),
    (SNAPSHOTS, f"reads one part in {changed.WINDOW} of what the list leaves out"),
    (SNAPSHOTS, f"survives at most {changed.WINDOW} runs"),
    (SNAPSHOTS, f"read the snapshot, for {'an hour' if exports._SECONDS == 3600 else '?'} at most"),
    (SNAPSHOTS, f"count as in use for {'a day' if imported._LIFE.days == 1 else '?'} after"),
    (PLUGIN, f"`export_worker_ssh_port`, by default {SETTINGS.export_worker_ssh_port},"),
    (PLUGIN, f"by default {SETTINGS.export_worker_data_port}, and the {channel.PORTS - 1} ports after it"),
    (PLUGIN, f"with up to {number(ssh_writer.RECEIVERS)} receivers"),
    (PLUGIN, f"a lease of {minutes(claims.LEASE_SECONDS)}, renewed every {claims.RENEW_SECONDS:.0f} seconds"),
    (PLUGIN, f"after {minutes(claims.PAUSE_SECONDS)} it fails"),
    (PLUGIN, f"waits {'two and a half' if claims.FENCE_SECONDS == 150 else '?'} minutes before it writes"),
    (PLUGIN, f"no sign of life for {'two and a half' if claims.FENCE_SECONDS == 150 else '?'} minutes counts as dead"),
    (PLUGIN, f"left ({DEAD} hours without a sign of life, {UNFINISHED} if"),
    (PLUGIN, f"deploying or deleting, {stalled.STALLED_SECONDS:.0f} seconds if that was for the same VM"),
    (PLUGIN, f"is deleted after {DEAD} hours in the same way"),
    (PLUGIN, f"After {UNFINISHED} it is deleted by any deployment"),
    (PLUGIN, f"at most one message {'a second' if provider._SECONDS_BETWEEN_STEPS == 1 else '?'} per disk"),
    (PLUGIN, f"polled every {number(min(patience._EARLY_SECONDS))} to {number(patience.POLLING_SECONDS)} seconds"),
    (PLUGIN, f"once it has shown no sign of life for {stalled.STALLED_SECONDS:.0f} seconds"),
    (PLUGIN, f"After {UNFINISHED}, so does any deployment"),
    (USAGE, f"`os.raw.grains`, up to {wire.DIGEST * MIB // wire.GRAIN} MiB per TiB"),
    (USAGE, f"the steps of the last {number(history._RUNS)} runs"),
    (USAGE, f"without it, {LINE[0]:.0f} Mbit/s to {LINE[1] / 1000:.0f} Gbit/s are assumed"),
    ("reference/errors.md", f"is then retried for {minutes(resources.PATIENCE_SECONDS)}"),
    ("howto/blob.md", f"waits for its lease, at most {minutes(vhds.LEASE_SECONDS)}"),
    ("howto/blob.md", f"a page blob, {wire.DIGEST * MIB // wire.GRAIN} MiB per TiB"),
    ("howto/blob.md", f"write the grains of {wire.GRAIN // KIB} KiB that changed"),
    ("howto/blob.md", f"only the blocks of {draft.BLOCK // KIB} KiB that changed"),
    ("howto/cutover.md", f"Azure takes {minutes(cutover.DEALLOCATION_SECONDS)} to deallocate"),
    ("howto/fleet.md", f"{number(fleet._VMS_PER_CORE)} for each core of this host"),
    ("howto/fleet.md", f"one for each {fleet._MIB_PER_VM} MiB of its free memory, or {fleet.MOST}"),
    ("howto/fleet.md", f"The first pause is {fleet._PAUSE:.0f} seconds"),
    ("howto/fleet.md", f"twice as long, up to {minutes(fleet._LONGEST_PAUSE)}"),
    ("howto/fleet.md", f"throughput, up to {sizes.ENOUGH // MIB} MiB/s"),
    ("howto/fleet.md", f"with another one, at most {'twice' if fleet._WORKERS == 2 else '?'}"),
    ("howto/fleet.md", f"asked once in {minutes(fleet._SAME_SECONDS)}"),
    ("howto/fleet.md", f"refills its budgets {PACE:.0f} times as fast as Azure"),
    ("howto/handoff.md", "the domain has {} vCPUs and {} MiB of memory".format(*libvirt.UNKNOWN_SIZE)),
    ("howto/mechanisms.md", f"grains of {wire.GRAIN // KIB} KiB that Azure lists"),
    ("howto/mechanisms.md", f"reads one part in {changed.WINDOW} of what is not listed"),
    ("howto/nbd.md", f"the port is {nbd_url._PORT} unless given"),
    ("howto/nbd.md", f"silent for {minutes(nbd_store.PATIENCE)} ({minutes(nbd_store.FLUSH_PATIENCE)} for a flush)"),
    ("howto/private.md", f"{SETTINGS.export_worker_ssh_port} and {DATA_PORT} to {DATA_PORT + channel.PORTS - 1} ("),
    ("howto/schedules.md", f"in Blob storage after {minutes(vhds.LEASE_SECONDS)}"),
]  # fmt: skip


@pytest.mark.parametrize(("page", "sentence"), STATED)
def test_a_figure_of_a_page_is_that_of_the_code(page: str, sentence: str) -> None:
    if sentence not in " ".join((DOCS / page).read_text(encoding="utf-8").split()):
        pytest.fail(f"docs/{page} does not say what the code does: {sentence}", pytrace=False)


def test_every_chart_is_that_of_its_table_and_on_the_page() -> None:
    charts = runpy.run_path(str(DOCS / "make_charts.py"))["charts"]()
    page = (DOCS / "explanation" / "performance.md").read_text()
    assert len(charts) == 8
    for path, chart in charts.items():
        assert path.read_text() == chart, "run python docs/make_charts.py"
        assert f"](../pictures/{path.name})" in page
