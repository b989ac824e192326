"""What a check has found, and how questions to Azure become findings where they have no answer."""

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
    """What a step of a run would meet. `remedy` is empty where nothing is to be done."""

    step: str
    severity: Severity
    text: str
    remedy: str = ""

    @property
    def told(self) -> str:
        """The text and the remedy as sentences."""
        return f"{self.text.removesuffix('.')}. {self.remedy}".strip()

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Checked:
    """All findings; the machine, where one was named and could be read."""

    findings: tuple[Finding, ...]
    machine: Machine | None = None

    @property
    def errors(self) -> list[Finding]:
        """The findings with which a run would fail."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against a run."""
        return not self.errors

    def require(self) -> None:
        """InvalidInput with all errors and remedies, if there are any."""
        if not self.ok:
            raise InvalidInput(
                [finding.text for finding in self.errors],
                remedy=" ".join(dict.fromkeys(finding.remedy for finding in self.errors)) or None,
            )

    def checked_machine(self) -> Machine:
        """The machine, if nothing speaks against its run; else InvalidInput."""
        self.require()
        if self.machine is None:
            raise InvalidInput("no VM was named")
        return self.machine

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {"findings": [finding.to_json() for finding in self.findings], "ok": self.ok}


def error(step: str, text: str, remedy: str) -> Finding:
    """What would make a run fail."""
    return Finding(step, "error", text, remedy)


def warning(step: str, text: str, remedy: str = "") -> Finding:
    """What should be known before, or may make a run fail."""
    return Finding(step, "warning", text, remedy)


def fine(step: str, text: str) -> Finding:
    """What is as it must be."""
    return Finding(step, "fine", text)


def failed(step: str, raised: CoriolisAzureError, severity: Severity = "error") -> Finding:
    """An error in the words of a finding."""
    return Finding(step, severity, raised.message, raised.remedy)


def ask(
    step: str, question: Callable[[], T], *, optional: bool = False
) -> Generator[Finding, None, T | None]:
    """The answer to a question to Azure; None where there is none.

    Why there is none is a finding: an error, or a warning where the work may be possible without it.
    """
    try:
        return question()
    except CoriolisAzureError as raised:
        yield failed(step, raised, "warning" if optional else "error")
        return None
