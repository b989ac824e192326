"""The findings of a check, and how failed requests to Azure become findings."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from ..errors import CoriolisAzureError, InvalidInput
from ..model import Json, Machine

Severity = Literal["error", "warning", "fine"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """Something that a step of a run would encounter. `remedy` is "" if there is nothing to do."""

    step: str
    severity: Severity
    text: str
    remedy: str = ""

    @property
    def text_with_remedy(self) -> str:
        """The text and the remedy as sentences."""
        return f"{self.text.removesuffix('.')}. {self.remedy}".strip()

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Checked:
    """All findings, and the machine if one was named and could be read."""

    findings: tuple[Finding, ...]
    machine: Machine | None = None

    @property
    def errors(self) -> list[Finding]:
        """The findings that would make a run fail."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    def require(self) -> None:
        """Raise InvalidInput with all errors and remedies, if there are any."""
        if not self.ok:
            raise InvalidInput(
                [finding.text for finding in self.errors],
                remedy=" ".join(dict.fromkeys(finding.remedy for finding in self.errors)) or None,
            )

    def checked_machine(self) -> Machine:
        """The machine. Raises InvalidInput if there are errors or no VM was named."""
        self.require()
        if self.machine is None:
            raise InvalidInput("no VM was named")
        return self.machine

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {"findings": [finding.to_json() for finding in self.findings], "ok": self.ok}


def error(step: str, text: str, remedy: str) -> Finding:
    """A finding that would make a run fail."""
    return Finding(step, "error", text, remedy)


def warning(step: str, text: str, remedy: str = "") -> Finding:
    """A finding that users should know about, or that may make a run fail."""
    return Finding(step, "warning", text, remedy)


def fine(step: str, text: str) -> Finding:
    """A finding that needs no action."""
    return Finding(step, "fine", text)


def failed(step: str, raised: CoriolisAzureError, severity: Severity = "error") -> Finding:
    """The finding for an error that was raised."""
    return Finding(step, severity, raised.message, raised.remedy)


def ask(
    step: str, question: Callable[[], T], *, optional: bool = False
) -> Generator[Finding, None, T | None]:
    """Return the result of `question`; if it fails, yield the error as a finding and return None.

    With `optional`, the finding is a warning: a run may work without the answer.
    """
    try:
        return question()
    except CoriolisAzureError as raised:
        yield failed(step, raised, "warning" if optional else "error")
        return None
