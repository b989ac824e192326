"""The container of the settings."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Finding, ask, fine
from .subject import Subject


def container(subject: Subject) -> Iterator[Finding]:
    """The container of the settings, where they name one."""
    if not subject.context.environment.storage_account_name:
        return
    found = yield from ask("storage", subject.context.storage.interim)
    if found is None:
        return
    exists = yield from ask("storage", found.exists)
    if exists is not None:
        yield fine("storage", f"{found.url} {'is there' if exists else 'is made when it is needed'}")
