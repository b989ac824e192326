"""Every error a caller may see, as one tree.

Families end in `Error`; leaves name the fact. Each class carries its exit code and a remedy: one sentence in
the imperative that says what to do. A raise may give a better remedy than its class. Bugs (`KeyError`,
`TypeError`, ...) are not wrapped: they travel to the top with their trace.

Messages hold words of others: Azure's, the worker's, names of files. `cleaned` and `told_by_others` make them safe to
show.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeVar

# Control and format characters (escape sequences, line breaks, bidirectional overrides), surrogates, unassigned.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def cleaned(text: object, limit: int | None = None) -> str:
    r"""Text on one line that a terminal only shows: what it would act on is escaped (`\x1b`, `\n`, `\u202e`).

    At most `limit` characters of it are kept.
    """
    shown = str(text)[:limit]
    if shown.isprintable():
        return shown
    return "".join(map(_escaped, shown))


def told_by_others(words: object, limit: int = 500) -> str:
    """What another program has said, as a person may see it: cleaned, without blanks around it, not without end."""
    text = words.decode(errors="replace") if isinstance(words, bytes) else str(words)
    return cleaned(text.strip(), limit)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) not in _UNSAFE:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


E = TypeVar("E", bound="CoriolisAzureError")


class CoriolisAzureError(Exception):
    """The root of the tree: `message`, `remedy`, `exit_code`, and `facts` for machines (offset, code, ids, ...).

    `message` is cleaned. Several lines are given as several strings: a line break within one is escaped. `facts` are as
    they came; those that decisions are made by are attributes too, of the families that have them. `left_behind`: ids
    of temporary resources that could not be deleted.
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
        """The ids of temporary resources that stayed."""
        return list(self.facts.get("left_behind") or ())

    @left_behind.setter
    def left_behind(self, ids: list[str]) -> None:
        self.facts["left_behind"] = ids

    def reworded(self: E, message: str, *, remedy: str | None = None) -> E:
        """The same error with these words, its facts included."""
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
    """What the caller gave (settings, arguments, a destination) cannot be used as it is."""

    exit_code = 2
    remedy = "Correct the named setting or argument and run the command again; nothing was created."


class HostExhausted(InvalidInput):
    """This host has run out of something that the work needs: descriptors, threads, memory, space."""

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
        """Azure's word for what is wrong; "" where it has told none."""
        return str(self.facts.get("code") or "")

    @property
    def status(self) -> int:
        """The HTTP status of the answer; 0 where there was none."""
        return int(self.facts.get("status") or 0)

    @property
    def target(self) -> str:
        """What of the request is wrong, as Azure calls it; "" where it does not say."""
        return str(self.facts.get("target") or "")

    @property
    def retry_after(self) -> float:
        """The seconds after which Azure wants to be asked again; 0 where it names none."""
        return float(self.facts.get("retry_after") or 0)

    @property
    def reference(self) -> str:
        """By what Azure's support finds the request: its HTTP status and its id; "" where there was no answer."""
        request = self.facts.get("request_id")
        parts = [f"HTTP {self.status}" if self.status else "", f"request id {request}" if request else ""]
        return cleaned(", ".join(part for part in parts if part))


class CloudUnreachable(AzureError):
    """No answer from an Azure endpoint: network, DNS, proxy or certificate."""

    remedy = "Check the endpoint, the network path, the proxy and the CA bundle of the connection settings."


class Denied(AzureError):
    """The credentials were refused, or lack a permission for an action."""

    remedy = "Check the credentials, and give the identity the action that Azure's message names."


class NotFound(AzureError):
    """A resource that must exist does not."""

    remedy = "Check the name, the resource group and the subscription."


class Conflict(AzureError):
    """The resource is in use, locked or being changed by another operation."""

    remedy = "Wait for the other operation, or release the resource, then run the command again."


class DisksChanged(Conflict):
    """The VM got other disks, or one of another size, while its replication was prepared. Fact: `disks`, by role."""

    remedy = (
        "Run again: the disks that the VM has then are copied. The replica is as the last run has left it. "
        "A disk that comes and goes can be left out with exclude_disks."
    )


class QuotaExceeded(AzureError):
    """The subscription's quota, or the location's capacity, does not cover this request."""

    remedy = "Choose another export_worker_size or location, or ask for a higher quota."


class Throttled(AzureError):
    """Azure still answered "too many requests" after all retries."""

    remedy = "Wait some minutes and run again; run fewer transfers of this subscription side by side."


class OperationFailed(AzureError):
    """Azure accepted an operation, then reported that it failed."""

    remedy = "Read Azure's message; what this run had made is deleted, so the command can be run again."


class Unreadable(AzureError):
    """An answer that does not have the form that Azure documents."""

    remedy = (
        "Check that the endpoint is Azure's and that no proxy answers in its place. If so, report this as a fault of "
        "coriolis-azure, with the message and the document."
    )


class WorkerError(CoriolisAzureError):
    """The temporary worker VM did not do its part."""

    exit_code = 4
    remedy = "Run again; if it repeats, choose another export_worker_image or export_worker_size."


class Unreachable(WorkerError):
    """No SSH connection to the worker."""

    remedy = (
        "Allow this host to reach the worker's address and SSH port (firewall, export_network, "
        "export_worker_allowed_addresses, export_worker_ssh_port)."
    )


class WorkerGone(WorkerError):
    """Somebody else deleted the worker in the middle of a run."""

    remedy = (
        "Find out in the activity log who deletes the resources of a run, then run again: a new worker is made, "
        "and only what had not arrived is sent."
    )


class WorkerRestarted(WorkerError):
    """The worker boots again and again while it is read."""

    remedy = (
        "Find out in the activity log who restarts it, or choose another export_worker_image or export_worker_size, "
        "then run again: only what had not arrived is sent."
    )


class HostKeyChanged(WorkerError):
    """Something else than our worker answered at its address."""

    remedy = "Find out who answers at that address; nothing was sent to it."


class AgentFailed(WorkerError):
    """The agent on the worker ended with an error, or saw another disk than the promised one."""


class TransferError(CoriolisAzureError):
    """Disk content did not get from the worker to the destination. Facts: `disk`, `offset`."""

    exit_code = 5
    remedy = "Run again: what had arrived is kept, only the rest is sent."

    @property
    def disk(self) -> str:
        """The disk, by its role; "" where it is not of one."""
        return str(self.facts.get("disk") or "")

    @property
    def offset(self) -> int | None:
        """Where in the disk; None where that is not told."""
        return self.facts.get("offset")


class CorruptChunk(TransferError):
    """A chunk does not have the digest it should have; it was not kept."""

    remedy = (
        "Run again: the damaged chunk is sent anew. If it repeats, check memory and network of this host."
    )


class IncompleteReplica(TransferError):
    """The images of a replica are not all there, or are not of one run. Fact: `disk`, one that is not."""

    remedy = "Run the replication again: what had arrived is kept, and only the rest is sent."


class DestinationFailed(TransferError):
    """The destination refused to take or give back content."""

    remedy = "Check space, permissions and health of the destination, then run again."


class VolumeTaken(TransferError):
    """Another run has taken a volume over, or is writing to it."""

    remedy = "Wait until the other run of this VM has ended, then run again."


class StreamEnded(TransferError):
    """The worker's stream broke off, or said something that is not in the protocol."""


class ConnectionLost(StreamEnded):
    """The connection to the worker broke and could not be taken up again."""

    remedy = (
        "Look at the network between this host and the worker, then run again: what had arrived is kept, "
        "only the rest is sent."
    )


class DeadlinePassed(CoriolisAzureError):
    """Something did not happen within its stated time."""

    exit_code = 6
    remedy = "Run again; if it repeats, look at the named resource in the Azure portal."


class WaitEnded(DeadlinePassed):
    """A wait was called off, because what waited is to end."""

    remedy = "Run again; whoever called it off will know why."


class CleanupIncomplete(CoriolisAzureError):
    """Temporary resources could not be deleted. Fact: `left_behind`, their ids."""

    exit_code = 7
    remedy = (
        "Remove what blocks them (locks, permissions), then run `coriolis-azure cleanup`. Delete by hand those that "
        "have lost our tags: clean-up leaves them alone."
    )


class OutputLost(CoriolisAzureError):
    """The work is done, but its result could not be written to standard output."""

    exit_code = 8
    remedy = "Free space where standard output goes, or send it elsewhere. What was done stays: run again at any time."


_LIMITS = {
    errno.EMFILE: "Raise this user's limit of open files (ulimit -n; LimitNOFILE= of a service), then run again.",
    errno.ENFILE: "Raise the host's limit of open files (fs.file-max), or stop what holds them, then run again.",
    errno.ENOMEM: "Free memory of this host, or raise the limit of this process, then run again.",
    errno.ENOSPC: "Free space there, then run again.",
    errno.EDQUOT: "Raise the quota there, then run again.",
}
_NO_THREAD = "can't start new thread"  # CPython's own words: there is no code


def exhausted(error: BaseException) -> HostExhausted | None:
    """What this host has run out of, where `error` or what it comes from says so.

    No waiting helps against that, and no other host is to blame, so whoever tries again or translates an error asks
    this first.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HostExhausted):
            return cause
        if isinstance(cause, OSError) and cause.errno in _LIMITS:
            where = f"{cause.filename}: " if cause.filename else ""
            return HostExhausted(f"{where}{os.strerror(cause.errno)}", remedy=_LIMITS[cause.errno])
        if isinstance(cause, MemoryError):
            return HostExhausted("there is no memory left", remedy=_LIMITS[errno.ENOMEM])
        if isinstance(cause, RuntimeError) and str(cause).startswith(_NO_THREAD):
            return HostExhausted(
                "this host does not let the process start another thread",
                remedy="Raise this user's limit of processes (ulimit -u; TasksMax= of a service), lower the size of a "
                "thread's stack (ulimit -s), or free memory, then run again.",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def exhausted_remedy(error: BaseException) -> str | None:
    """What to do about it, where this host has run out of something; None else."""
    limit = exhausted(error)
    return limit.remedy if limit else None
