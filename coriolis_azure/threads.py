"""The only place on the host where this package starts threads, and where what they share gets its lock."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from . import clock
from .clock import Scope

Lock = threading.Lock
Condition = threading.Condition
T = TypeVar("T")
R = TypeVar("R")
LOG = logging.getLogger(__name__)


class _Task(Generic[R]):
    """A piece of work, done once: by a thread of the pool, or by the one that needs its result."""

    def __init__(self, work: Callable[[], R], scope: Scope) -> None:
        self._work, self._scope = work, scope
        self._claim = threading.Lock()
        self.future: Future[R] = Future()

    def run(self) -> None:
        """Do it, unless somebody else does or it was cancelled."""
        if not self._claim.acquire(blocking=False) or not self.future.set_running_or_notify_cancel():
            return
        try:
            with self._scope.entered():
                result = self._work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is due
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def ordered(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int,
    ahead: int,
    abort: Callable[[], None] | None = None,
) -> Generator[R, None, None]:
    """Yield work(item) in the order of `items`, never more than `ahead` of them in memory.

    The first error is raised where its result is due. However the loop ends early (an error, an interrupt,
    the generator being closed), what had not begun never does, its waits end, then `abort` is called, which has to
    make running work end soon, and only then are the threads joined. Wrap it in `contextlib.closing` where the
    body of the loop may raise: a generator that is merely dropped ends when it is collected.

    Where the system gives no thread, the calling thread does the work.
    """
    scope = Scope(clock.scope())
    pool = ThreadPoolExecutor(threads)
    pending: deque[_Task[R]] = deque()
    alone = False

    def result() -> R:
        if alone:
            pending[0].run()
        return pending.popleft().future.result()

    try:
        for item in items:
            pending.append(_Task(partial(work, item), scope))
            alone = alone or not _submitted(pool, pending[-1])
            while pending and (alone or len(pending) >= ahead or pending[0].future.done()):
                yield result()
        while pending:
            yield result()
    except BaseException as error:
        for task in pending:
            task.future.cancel()
        # After an error, what Azure has begun is seen through, so that it can be undone; an interrupt waits no more.
        (scope.hurry if isinstance(error, Exception) else scope.cancel)()
        if abort is not None:
            abort()
        raise
    finally:
        pool.shutdown()


def _submitted(pool: ThreadPoolExecutor, task: _Task[Any]) -> bool:
    """Whether a thread will do the task."""
    try:
        pool.submit(task.run)
    except (RuntimeError, MemoryError) as error:  # no thread is left, or no room for its stack
        LOG.info("working in one thread: %s", error)
        return False
    return True


def aside(act: Callable[[], None]) -> Callable[[], None]:
    """Do `act` in a thread of its own; what this gives back waits for its end. It must not raise."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread.join


@contextmanager
def every(seconds: float, act: Callable[[], None], *, optional: bool = False) -> Iterator[None]:
    """Do `act` again and again while the block runs, `seconds` apart, in a thread of its own. It must not raise.

    Where the system gives no thread: nothing is done if it is `optional`, else the RuntimeError says so.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        if not optional:
            raise
        yield
        return
    try:
        yield
    finally:
        ended.set()
        thread.join(1.0)  # what it does just now may take its time


def later(seconds: float, act: Callable[[], None]) -> None:
    """Do `act` after so many seconds, in a thread of its own, if this process lives so long. It must not raise.

    Where the system gives no thread it is done at once.
    """
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    try:
        timer.start()
    except (RuntimeError, MemoryError):
        act()


@contextmanager
def within(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Do `act`, in a thread of its own, where the block takes longer than that. It must not raise."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
