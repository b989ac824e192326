"""Attaches clones to a worker, and replaces them if it reboots.

A worker that boots while clones are attached may mistake one of them for its own disk: it finds its root file system by
a label or UUID that a clone may have too, and writes to it before any of our udev rules apply. So every connection
checks the boot id. After a reboot, none of the clones can be trusted: the worker is stopped, the clones are recreated
from their snapshots, and they are attached once it is running again. A worker that several runs share is left alone:
those runs get another one.
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
from ..run import attached_disks, resources
from ..threads import Lock

RESTARTS = 3  # tolerated while one wave of clones is read


class Attachment:
    """A wave of clones attached to `reader`. A context manager that detaches and deletes them. Thread-safe.

    `make` creates the clones and returns their ids; its argument counts the previous calls, so that each clone gets a
    new name: creating a disk that exists already would leave its content as it is. `delete` deletes clones; without it,
    they stay attached at the end, because the worker is deleted next, and Azure deletes them along with it.
    """

    def __init__(
        self,
        azure: Azure,
        reader: Worker,
        make: Callable[[int], list[str]],
        delete: Callable[[list[str]], object] | None,
        clock: Clock,
        report: Report,
    ) -> None:
        self._azure, self._reader, self._make, self._delete = azure, reader, make, delete
        self._clock, self._report = clock, report
        self._lock, self._attached = Lock(), ExitStack()
        self._boot, self._restarts, self._stopped = "", 0, False
        self._failure: Exception | None = None
        self.clones: list[str] = []
        self.luns: list[int] = []
        self.devices: list[tuple[str, ...]] = []

    def __enter__(self) -> Attachment:
        self.clones = self._make(0)
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._delete is not None:
            self._attached.__exit__(kind, error, trace)
            if error is None:
                self._delete(self.clones)

    def agent(self, line: ssh.Line) -> ssh.AgentStream:
        """Start an agent over `line`, on a worker that has not rebooted since the clones were attached.

        Raises what `Line.connect` and `Line.agent` raise, and WorkerRestarted if it keeps rebooting.
        """
        while True:
            expected = self._boot
            try:
                boot = line.connect().boot_id()
            except HostKeyChanged:
                boot = ""  # it may have booted the system on a clone
            if boot == expected:
                return line.agent()
            self._renew(expected)

    def stop(self) -> None:
        """Start nothing more: the transfer is cancelled."""
        self._stopped = True

    def _attach(self) -> None:
        boot = ssh.asked(
            ssh.Connection.boot_id,
            self._reader,
            self._clock,
            self._report,
            given_up=self._is_useless,
        )
        if self._delete is None:
            self.luns = attached_disks.attach(self._azure, self._reader, self.clones, self._clock)
        else:
            attached = attached_disks.attached(self._azure, self._reader, self.clones, self._clock)
            self.luns = self._attached.enter_context(attached)
        self.devices = [attached_disks.devices(lun) for lun in self.luns]
        self._boot = boot

    def _is_useless(self) -> bool:
        """Whether there is nothing to wait for: the transfer is cancelled, or a worker that was up is gone."""
        shared = self._reader.shared
        return self._stopped or (shared and not resources.may_exist(self._azure, self._reader.vm))

    def _renew(self, boot: str) -> None:
        """Replace the clones attached during `boot`, unless another thread has done so."""
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
        if (
            self._reader.shared
        ):  # clones of other runs are attached to it: each of them is to get another worker
            raise WorkerRestarted(f"the worker {vm} has rebooted while its disks were read")
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise WorkerRestarted(
                f"the worker {vm} has rebooted {counted(self._restarts, 'time')} while its disks were read"
            )
        notice = (
            f"the worker {vm} has rebooted with the clones attached: they are recreated from the snapshots"
        )
        self._report(Notice(notice))
        self._step("stop worker", lambda: self._azure.power_off(self._reader.vm))
        self._attached.close()
        attached_disks.emptied(self._azure, self._reader.vm, self._report, self._clock)
        untrusted = self.clones
        self.clones = self._make(self._restarts)
        if self._delete is not None:
            self._delete(untrusted)
        self._step("start worker", lambda: self._azure.start(self._reader.vm))
        self._attach()

    def _step(self, name: str, act: Callable[[], object]) -> None:
        if self._stopped:
            raise Unreachable("the transfer was cancelled")
        self._report(Step(name, name_of(self._reader.vm)))
        act()
