"""Checks the container of the settings."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Finding, ask, fine
from .subject import Subject


def container(subject: Subject) -> Iterator[Finding]:
    """Check the storage account and container of the settings, if they name one."""
    if not subject.context.environment.storage_account_name:
        return
    interim = yield from ask("storage", subject.context.storage.interim)
    if interim is None:
        return
    exists = yield from ask("storage", interim.exists)
    if exists is not None:
        yield fine("storage", f"{interim.url} {'exists' if exists else 'is created when it is needed'}")
