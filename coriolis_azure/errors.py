"""All errors that a caller may see, as one tree.

Families end in `Error`; leaves name the fact. Each class carries an exit code and a remedy, in the imperative, that
says what to do. A raise may give a better remedy than that of its class. Bugs (`KeyError`, `TypeError`, ...) are not
wrapped: they reach the top with their traceback.

Example: decide by the class, show the message and the remedy.

    from coriolis_azure import errors

    try:
        source.replicate("no-such-vm", "replicas/no-such-vm")
    except errors.CoriolisAzureError as error:
        print(f"{error.message}. {error.remedy} Exit code {error.exit_code}.")

Messages contain text from others: from Azure, from the worker, names of files. `cleaned` and `cleaned_output` make it
safe to show.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

# Control and format characters (escape sequences, line breaks, bidirectional overrides), surrogates, unassigned.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def cleaned(text: object, limit: int | None = None) -> str:
    r"""`text` with everything escaped that a terminal would act on or break the line at (`\x1b`, `\n`, `\u202e`).

    Only the first `limit` characters are kept.
    """
    shown = str(text)[:limit]
    if shown.isprintable():
        return shown
    return "".join(map(_escaped, shown))


def cleaned_output(output: object, limit: int = 500) -> str:
    """The output of another program, safe to show: cleaned, stripped, and cut off after `limit` characters."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else str(output)
    return cleaned(text.strip(), limit)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) not in _UNSAFE:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


E = TypeVar("E", bound="CoriolisAzureError")


class CoriolisAzureError(Exception):
    """The root of the tree. All have a `message`, a `remedy`, an `exit_code`, and `facts` for machines (ids, codes).

    `message` is cleaned. To give several lines, pass several strings: a line break within a string is escaped. `facts`
    are not cleaned. Facts that code decides by are also attributes of the families that have them. `left_behind` are
    the ids of temporary resources that could not be deleted.
    """

    exit_code = 1
    remedy = "Report this as a fault of coriolis-azure, with the message."

    def __init__(self, message: str | Sequence[str], *, remedy: str | None = None, **facts: Any) -> None:
        lines = [message] if isinstance(message, str) else message
        self.message = "\n".join(map(cleaned, lines))
        super().__init__(self.message)
        self.facts = facts
        if remedy is not None:
            self.remedy = cleaned(remedy)

    @property
    def left_behind(self) -> list[str]:
        """The ids of temporary resources that could not be deleted."""
        return list(self.facts.get("left_behind") or ())

    @left_behind.setter
    def left_behind(self, ids: list[str]) -> None:
        self.facts["left_behind"] = ids

    def reworded(self: E, message: str, *, remedy: str | None = None) -> E:
        """A copy of this error with another message, and the same facts."""
        return type(self)(message, remedy=remedy or self.remedy, **self.facts)

    def to_json(self) -> dict[str, Any]:
        """The error as `--json` prints it."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
            **{name: value for name, value in self.facts.items() if value is not None},
        }


class InvalidInput(CoriolisAzureError):
    """The caller's input (settings, arguments, a destination) cannot be used as it is."""

    exit_code = 2
    remedy = "Correct the named setting or argument and run the command again; nothing was created."


class NoReplica(InvalidInput):
    """There is no replica at the destination."""

    remedy = (
        "Replicate a VM to it first. If it is a folder with the replicas of several VMs, name one: DEST/VM."
    )


class HostExhausted(InvalidInput):
    """This host has run out of a resource: file descriptors, threads, memory, space."""

    remedy = "Free what the message names, or raise its limit, then run again."


class Unsupported(InvalidInput):
    """This VM or disk cannot be moved; the message says why."""

    remedy = "Leave this VM or disk out, or change it as the message says."


class AzureError(CoriolisAzureError):
    """Azure refused a request or an operation. Facts: `code`, `status`, `resource`, `request_id`."""

    exit_code = 3
    remedy = "Read Azure's message; if it does not name a cause on your side, run the command again later."

    @property
    def code(self) -> str:
        """Azure's error code; "" if the answer had none."""
        return str(self.facts.get("code") or "")

    @property
    def status(self) -> int:
        """The HTTP status of the answer; 0 if there was none."""
        return int(self.facts.get("status") or 0)

    @property
    def target(self) -> str:
        """The part of the request that is wrong, in Azure's terms; "" if Azure does not tell."""
        return str(self.facts.get("target") or "")

    @property
    def retry_after(self) -> float:
        """The seconds to wait before a retry, according to Azure; 0 if it does not tell."""
        return float(self.facts.get("retry_after") or 0)

    @property
    def reference(self) -> str:
        """The HTTP status and request id, by which Azure's support can find the request; "" if there was no answer."""
        request = self.facts.get("request_id")
        parts = [f"HTTP {self.status}" if self.status else "", f"request id {request}" if request else ""]
        return cleaned(", ".join(part for part in parts if part))


class CloudUnreachable(AzureError):
    """No answer from an Azure endpoint: network, DNS, proxy or certificate."""

    remedy = "Check the endpoint, the network path, the proxy and the CA bundle of the connection settings."


class Denied(AzureError):
    """The credentials were rejected, or the identity lacks a permission."""

    remedy = "Check the credentials, and give the identity the action that Azure's message names."


class NotFound(AzureError):
    """A resource that must exist does not exist."""

    remedy = "Check the name, the resource group and the subscription."


class Conflict(AzureError):
    """The resource is in use, locked or being changed by another operation."""

    remedy = "Wait for the other operation, or release the resource, then run the command again."


class DisksChanged(Conflict):
    """The VM's disks were changed or resized while its replication was prepared. Fact: `disks`, by role."""

    remedy = (
        "Run again: the disks that the VM has then are copied. The replica is as the last run left it. "
        "Leave out a disk that comes and goes with exclude_disks."
    )


class QuotaExceeded(AzureError):
    """The subscription's quota, or the location's capacity, does not cover this request."""

    remedy = "Choose another export_worker_size or location, or ask for a higher quota."


class Throttled(AzureError):
    """Azure still answered "too many requests" after all retries."""

    remedy = "Wait a few minutes and run again; run fewer transfers in this subscription concurrently."


class OperationFailed(AzureError):
    """Azure accepted an operation, then reported that it failed."""

    remedy = "Read Azure's message; what this run created is deleted, so the command can be run again."


class Unreadable(AzureError):
    """An answer does not have the form that Azure documents."""

    remedy = (
        "Check that the endpoint is Azure's and that no proxy answers in its place. If that is not the cause, report "
        "this as a fault of coriolis-azure, with the message and the document."
    )


class WorkerError(CoriolisAzureError):
    """The temporary worker VM failed."""

    exit_code = 4
    remedy = "Run again; if it repeats, choose another export_worker_image or export_worker_size."


class Unreachable(WorkerError):
    """No SSH connection to the worker."""

    remedy = (
        "Allow this host to reach the worker's address and SSH port (firewall, export_network, "
        "export_worker_allowed_addresses, export_worker_ssh_port)."
    )


class WorkerGone(WorkerError):
    """Somebody else deleted the worker during a run."""

    remedy = (
        "Find out in the activity log who deletes the resources of a run, then run again: a new worker is created, "
        "and only what had not arrived is sent."
    )


class WorkerRestarted(WorkerError):
    """The worker kept rebooting while its disks were read."""

    remedy = (
        "Find out in the activity log who restarts it, or choose another export_worker_image or export_worker_size, "
        "then run again: only what had not arrived is sent."
    )


class HostKeyChanged(WorkerError):
    """Something other than our worker answered at its address."""

    remedy = "Find out who answers at that address; nothing was sent to it."


class AgentFailed(WorkerError):
    """The agent on the worker ended with an error, or found a disk other than the expected one."""


class TransferError(CoriolisAzureError):
    """Disk content did not get from the worker to the destination. Facts: `disk`, `offset`."""

    exit_code = 5
    remedy = "Run again: what had arrived is kept, only the rest is sent."

    @property
    def disk(self) -> str:
        """The role of the disk; "" if the error does not concern a single disk."""
        return str(self.facts.get("disk") or "")

    @property
    def offset(self) -> int | None:
        """The offset in the disk, in bytes; None if it is unknown."""
        return self.facts.get("offset")


class CorruptChunk(TransferError):
    """A chunk does not have the expected digest; it was not kept."""

    remedy = (
        "Run again: the damaged chunk is sent again. If it repeats, check memory and network of this host."
    )


class ChangeListWrong(TransferError):
    """Azure's list of changes leaves out a change. Facts: `disk`, `offset`. The run then reads everything."""

    remedy = "Run with --full, which does not rely on the list, and tell Microsoft the disk and the offset."


class IncompleteReplica(TransferError):
    """Images of a replica are missing or belong to different runs. Fact: `disk`, one of them."""

    remedy = "Run the replication again: what had arrived is kept, and only the rest is sent."


class DestinationFailed(TransferError):
    """The destination failed to write or read content."""

    remedy = "Check space, permissions and health of the destination, then run again."


class VolumeTaken(TransferError):
    """Another run has taken over a volume, or is writing to it."""

    remedy = "Wait until the other run of this VM has ended, then run again."


class StreamEnded(TransferError):
    """The worker's stream ended early or violated the protocol."""


class ConnectionLost(StreamEnded):
    """The connection to the worker broke and could not be restored."""

    remedy = (
        "Check the network between this host and the worker, then run again: what had arrived is kept, "
        "only the rest is sent."
    )


class DeadlinePassed(CoriolisAzureError):
    """Something did not happen within its time limit."""

    exit_code = 6
    remedy = "Run again; if it repeats, look at the named resource in the Azure portal."


class WaitEnded(DeadlinePassed):
    """A wait was cancelled because the work it belongs to is to end."""

    remedy = "Run again, unless somebody cancelled it on purpose."


class Cancelled(CoriolisAzureError):
    """The work was cancelled, and what it had made is deleted. Fact: `left_behind`, what could not be."""

    exit_code = 130
    remedy = "Run again when you like: what had arrived is kept."


class CleanupIncomplete(CoriolisAzureError):
    """Temporary resources could not be deleted. Fact: `left_behind`, their ids."""

    exit_code = 7
    remedy = (
        "Remove what blocks their deletion (locks, permissions), then run `coriolis-azure cleanup`. Delete by hand "
        "those that have lost our tags: clean-up leaves them alone."
    )


class OutputLost(CoriolisAzureError):
    """The work is done, but its result could not be written to standard output, or the page about it to its file."""

    exit_code = 8
    remedy = "Free space where standard output goes, or redirect it. Nothing is lost: run again at any time."


_LIMITS = {
    errno.EMFILE: "Raise this user's limit of open files (ulimit -n; LimitNOFILE= of a service), then run again.",
    errno.ENFILE: "Raise the host's limit of open files (fs.file-max), or stop what holds them, then run again.",
    errno.ENOMEM: "Free memory on this host, or raise the limit of this process, then run again.",
    errno.ENOSPC: "Free space there, then run again.",
    errno.EDQUOT: "Raise the quota there, then run again.",
}
_NO_THREAD = "can't start new thread"  # CPython's message: there is no error code


def exhausted(error: BaseException) -> HostExhausted | None:
    """The HostExhausted for `error`, if it or one of its causes shows that this host has run out of a resource.

    Waiting does not help then, and no other host is to blame: check this before retrying or translating an error.
    """
    for cause in _causes(error):
        if isinstance(cause, HostExhausted):
            return cause
        if isinstance(cause, OSError) and cause.errno in _LIMITS:
            where = f"{cause.filename}: " if cause.filename else ""
            return HostExhausted(f"{where}{os.strerror(cause.errno)}", remedy=_LIMITS[cause.errno])
        if isinstance(cause, MemoryError):
            return HostExhausted("this host is out of memory", remedy=_LIMITS[errno.ENOMEM])
        if isinstance(cause, RuntimeError) and str(cause).startswith(_NO_THREAD):
            return HostExhausted(
                "the process cannot start another thread on this host",
                remedy="Raise this user's limit of processes (ulimit -u; TasksMax= of a service), reduce the thread "
                "stack size (ulimit -s), or free memory, then run again.",
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it comes from, each once. Libraries hold what they have caught as an argument, too."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            held = (getattr(cause, name, None) for name in ("reason", "inner_exception"))
            behind = (cause.__cause__ or cause.__context__, *held, *cause.args)
            waiting += [each for each in behind if isinstance(each, BaseException)]


def exhausted_remedy(error: BaseException) -> str | None:
    """The remedy if `error` shows that this host has run out of a resource; None otherwise."""
    limit = exhausted(error)
    return limit.remedy if limit else None
