"""The lifetime of a run: it shows signs of life, and whatever ends it, everything that it created is deleted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..azure.context import Context
from ..clock import Scope
from ..errors import CleanupIncomplete, CoriolisAzureError, exhausted
from ..events import Notice, Step
from ..threads import every, settle
from . import cleanup
from .interrupts import shielded
from .journal import Journal
from .resources import Resources

LOG = logging.getLogger(__name__)

_LIFE_SECONDS = 15 * 60.0


@contextmanager
def alive(resources: Resources) -> Iterator[None]:
    """Show signs of life during the block, and reserve file descriptors for the clean-up that follows."""
    with resources.spare, every(_LIFE_SECONDS, resources.show_life):
        yield


@contextmanager
def temporary(
    context: Context,
    resources: Resources,
    journal: Journal,
    *,
    listed: bool = True,
    work: Scope | None = None,
) -> Iterator[list[str]]:
    """Delete everything of the run when the block ends. Then the list holds the ids of what could not be deleted.

    Unless it is `listed`, only what the journal names is deleted: the caller is going to `finish_several`. What threads
    of `work`, the scope of the block, still make after a second interrupt is waited for. An error in the block is never
    replaced by one of the clean-up; it gets `left_behind`.
    """
    left_behind: list[str] = []
    try:
        with alive(resources):
            yield left_behind
    except BaseException as raised:
        error = raised if isinstance(raised, CoriolisAzureError) else exhausted(raised) or raised
        left_behind += _cleaned_up(context, resources, journal, work, listed=listed)
        if isinstance(error, CoriolisAzureError) and left_behind:
            error.left_behind = left_behind
        elif isinstance(error, KeyboardInterrupt) and left_behind:
            raise CleanupIncomplete(
                f"interrupted; not deleted: {', '.join(left_behind)}", left_behind=left_behind
            ) from error
        if error is not raised:
            raise error from raised
        raise
    left_behind += _cleaned_up(context, resources, journal, work, listed=listed)


def _cleaned_up(
    context: Context, resources: Resources, journal: Journal, work: Scope | None, *, listed: bool
) -> list[str]:
    """Delete everything that a run made; return the ids that are or may be left behind.

    Raises nothing: see `temporary`.
    """
    resources.spare.give()
    try:
        with shielded(lambda text: context.report(Notice(text))):
            if work is not None:
                settle(work)
            if listed:
                left_behind = cleanup.finish(context, resources.run, journal.ids)
            else:
                context.report(Step("clean up", resources.run.id))
                left_behind = resources.delete(journal.ids)
        if not left_behind:
            journal.done()
    except BaseException as error:  # it must not replace the outcome of the run itself
        LOG.log(_level(error), "clean-up was not completed", exc_info=error)
        context.report(Notice(f"clean-up was not completed: {str(error) or 'interrupted'}"))
        left_behind = list(journal.ids)
    if left_behind:
        context.report(Notice(f"not deleted; run `coriolis-azure cleanup`: {', '.join(left_behind)}"))
    return left_behind


def _level(error: BaseException) -> int:
    """The log level for an error of the clean-up: a bug of this program is shown to everyone, with its traceback."""
    return logging.DEBUG if isinstance(error, CoriolisAzureError | KeyboardInterrupt) else logging.ERROR
