"""Clones on a worker, for as long as it does not boot again.

A worker that boots while clones are attached may take one of them for a disk of its own: it looks for its root by a
label or UUID that a clone may have too, and writes to what it finds before any rule of ours is in force. So the boot is
asked for on every connection. After another one all clones are in doubt: the worker is stopped, they are made anew from
their snapshots, and they are attached when it is up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from ..azure.client import Azure
from ..azure.names import name_of
from ..clock import Clock
from ..errors import HostKeyChanged, Unreachable, WorkerRestarted
from ..events import Notice, Report, Step, counted
from ..model import Worker
from ..readers import ssh
from ..run import attached_disks
from ..threads import Lock

RESTARTS = 3  # of a worker while one wave of clones is read


class Attachment:
    """A wave of clones on `reader`. A context manager; leaving it detaches them. For threads, one for each disk.

    `make` gives the ids of new clones; it is told how often that was done before, so that no name comes twice: Azure
    would leave a disk as it is that is there already. `delete` removes clones that are in doubt.
    """

    def __init__(
        self,
        azure: Azure,
        reader: Worker,
        make: Callable[[int], list[str]],
        delete: Callable[[list[str]], object],
        clock: Clock,
        report: Report,
    ) -> None:
        self._azure, self._reader, self._make, self._delete = azure, reader, make, delete
        self._clock, self._report = clock, report
        self._lock, self._attached = Lock(), ExitStack()
        self._boot, self._restarts, self._stopped = "", 0, False
        self._failure: Exception | None = None
        self.clones: list[str] = []
        self.devices: list[tuple[str, ...]] = []

    def __enter__(self) -> Attachment:
        self.clones = self._make(0)
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attached.__exit__(kind, error, trace)

    def agent(self, line: ssh.Line) -> ssh.AgentStream:
        """A new agent over `line`, on a worker that has not booted since the clones were attached.

        Raises what `Line.connect` and `Line.agent` raise, and WorkerRestarted where it boots again and again.
        """
        while True:
            expected = self._boot
            try:
                boot = line.connect().boot_id()
            except HostKeyChanged:
                boot = ""  # what answers may be the system on a clone
            if boot == expected:
                return line.agent()
            self._renew(expected)

    def stop(self) -> None:
        """Begin nothing more: the transfer was given up."""
        self._stopped = True

    def _attach(self) -> None:
        with ssh.connect(
            self._reader, self._clock, self._report, ssh.READY_SECONDS, lambda: self._stopped
        ) as connection:
            boot = connection.boot_id()
        attached = attached_disks.attached(self._azure, self._reader, self.clones, self._clock)
        self.devices = self._attached.enter_context(attached)
        self._boot = boot

    def _renew(self, boot: str) -> None:
        """Replace the clones of `boot` by new ones, unless another thread has done so."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._boot != boot:
                return
            try:
                self._replace()
            except Exception as error:
                self._failure = error
                raise

    def _replace(self) -> None:
        vm = name_of(self._reader.vm)
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise WorkerRestarted(
                f"the worker {vm} has booted again {counted(self._restarts, 'time')} while it was read"
            )
        told = f"the worker {vm} has booted again with the clones attached: they are made anew from the snapshots"
        self._report(Notice(told))
        self._step("stop worker", lambda: self._azure.power_off(self._reader.vm))
        self._attached.close()
        attached_disks.emptied(self._azure, self._reader.vm, self._report, self._clock)
        doubtful = self.clones
        self.clones = self._make(self._restarts)
        self._delete(doubtful)
        self._step("start worker", lambda: self._azure.start(self._reader.vm))
        self._attach()

    def _step(self, name: str, act: Callable[[], object]) -> None:
        if self._stopped:
            raise Unreachable("the transfer was given up")
        self._report(Step(name, name_of(self._reader.vm)))
        act()
