"""The only module that starts threads on this host, and the source of the locks for what they share."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any, Generic, TypeVar

from . import clock
from .clock import Scope
from .errors import WaitEnded, exhausted

Lock = threading.Lock
Condition = threading.Condition
Local = threading.local
T = TypeVar("T")
R = TypeVar("R")
LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2
# The work of each `ordered` and `Background` that has not ended, by its scope. Each operation on it is atomic.
_under_way: dict[Scope, deque[_Task[Any]]] = {}


class _Task(Generic[R]):
    """A piece of work that runs once: in a thread of the pool, or in the thread that needs its result."""

    def __init__(self, work: Callable[[], R], scope: Scope, weight: int) -> None:
        self._work, self._scope, self.weight = work, scope, weight
        self._claim = threading.Lock()
        self.future: Future[R] = Future()

    def run(self) -> None:
        """Run the work, unless another thread does or it is cancelled."""
        if not self._claim.acquire(blocking=False) or not self.future.set_running_or_notify_cancel():
            return
        try:
            with self._scope.entered():
                result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where the result is due
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def ordered(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int,
    ahead: int,
    weigh: Callable[[T], int] = lambda _: 1,
    abort: Callable[[], None] | None = None,
) -> Generator[R, None, None]:
    """Yield work(item) in the order of `items`, with at most `ahead` of them in memory.

    `weigh` tells how much of `ahead` an item takes. The next item is begun once there is any room.

    The first error is raised where its result is due. If the loop ends early (by an error, an interrupt, or closing
    the generator), work that has not started is dropped, waits end, and `abort` is called, which must make running
    work end soon; then the threads are joined. Wrap the generator in `contextlib.closing` if the body of the loop may
    raise: otherwise it ends only when it is garbage-collected.

    If the system cannot start a thread, the calling thread does the work.
    """
    around = clock.scope()
    scope = Scope(around)
    pool = ThreadPoolExecutor(threads)
    pending: deque[_Task[R]] = deque()
    held, alone = 0, False
    _under_way[scope] = pending

    def result() -> R:
        nonlocal held
        if alone:
            pending[0].run()
        _await(pending[0].future, around)
        held -= pending[0].weight
        return pending.popleft().future.result()

    try:
        for item in items:
            pending.append(_Task(partial(work, item), scope, weigh(item)))
            held += pending[-1].weight
            alone = alone or not _submitted(pool, pending[-1])
            while pending and (alone or held >= ahead or pending[0].future.done()):
                yield result()
        while pending:
            yield result()
    except BaseException as error:
        try:
            # After an error, operations in Azure are still waited for, so that they can be undone.
            (scope.hurry if isinstance(error, Exception) else scope.cancel)()
            for task in pending:
                task.future.cancel()
        finally:  # also if a second interrupt comes
            if abort is not None:
                abort()
        raise
    finally:
        _join(scope, pool, pending)


class Background(Generic[R]):
    """Does work in a thread of its own while the calling thread goes on, one piece at a time.

    Close it: that cancels the work under way and joins it.
    """

    def __init__(self) -> None:
        self._around = clock.scope()
        self._scope, self._pool = Scope(self._around), ThreadPoolExecutor(1)
        self._pending: deque[_Task[R]] = deque()
        _under_way[self._scope] = self._pending

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return bool(self._pending) and not self._pending[0].future.done()

    def begin(self, work: Callable[[], R]) -> None:
        """Begin this work, which is `done` afterwards if the system cannot start a thread. Call `result` before."""
        task = _Task(work, self._scope, 1)
        self._pending.append(task)
        if not _submitted(self._pool, task):
            task.run()

    def result(self) -> R | None:
        """Wait for the work and return its result, or raise its error; None if there was no work."""
        if not self._pending:
            return None
        _await(self._pending[0].future, self._around)
        return self._pending.popleft().future.result()

    def close(self) -> None:
        """Cancel the work under way, if any, and wait for its end."""
        self._scope.cancel()
        for task in self._pending:
            task.future.cancel()
        _join(self._scope, self._pool, self._pending)


def _join(scope: Scope, pool: ThreadPoolExecutor, pending: Iterable[_Task[Any]]) -> None:
    """Wait for the end of the work of a scope that has not been cancelled."""
    pool.shutdown()
    # An interrupt in the middle of `submit` leaves a thread that runs and that the pool does not know.
    futures.wait(task.future for task in pending if not task.future.cancelled())
    _under_way.pop(scope, None)


def _await(future: Future[Any], around: Scope | None) -> None:
    """Wait until the future is done. Raises WaitEnded if the scope is cancelled meanwhile.

    Never in one wait: a signal that comes right before it begins would be handled at its end.
    """
    while not future.done():
        if around is not None and around.cancelled:
            raise WaitEnded("the work was cancelled")
        with suppress(TimeoutError, FutureTimeout):  # two names of one, from Python 3.11 on
            future.exception(_LOOK_SECONDS)


def settle(block: Scope) -> None:
    """Cancel work of `ordered` or `Background` within `block` that has been abandoned, and wait until it has ended.

    A second interrupt in `ordered`, while its threads are joined, leaves them running.
    """
    for scope, pending in list(_under_way.items()):
        if scope.is_within(block):
            scope.cancel()
            futures.wait([task.future for task in list(pending) if not task.future.cancel()])
            _under_way.pop(scope, None)


def side_by_side(*acts: Callable[[], Any]) -> list[Any]:
    """Run these at the same time; return their results. The first error that happens is raised once all have ended.

    It hurries the others: their long waits end, but operations in Azure are still waited for, so that they can be
    undone.
    """
    errors: list[Exception] = []

    def noted(act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # noqa: BLE001 - the first one is raised below
            errors.append(error)
            if (work := clock.scope()) is not None:
                work.hurry()

    results = list(ordered(noted, acts, threads=len(acts), ahead=len(acts)))
    if errors:
        raise errors[0]
    return results


def _submitted(pool: ThreadPoolExecutor, task: _Task[Any]) -> bool:
    """Submit the task; return whether a thread will run it."""
    try:
        pool.submit(task.run)
    except (RuntimeError, MemoryError) as error:  # no more threads, or no memory for the stack of one
        LOG.info("continuing in a single thread: %s", error)
        return False
    return True


def _about(act: Callable[[], None]) -> Callable[[], None]:
    """`act` within a scope for the VM and disk of this thread's scope, but not cancelled with it."""
    scope = clock.apart()

    @wraps(act)
    def acting() -> None:
        with scope.entered():
            act()

    return acting


def aside(act: Callable[[], None]) -> Callable[[], None]:
    """Run `act`, which must not raise, in a thread of its own; return a function that waits for its end."""
    thread = threading.Thread(target=_about(act), daemon=True)
    thread.start()
    return thread.join


@contextmanager
def every(seconds: float, act: Callable[[], None], *, optional: bool = False) -> Iterator[None]:
    """Call `act` every `seconds` during the block, in a thread of its own. What it raises is logged, and it goes on.

    If the system cannot start a thread, an `optional` one is left out; otherwise the RuntimeError is raised.
    """
    ended = threading.Event()

    def repeat() -> None:
        level = logging.WARNING
        while not ended.wait(seconds):
            try:
                act()
            except Exception as error:  # a host without memory for a moment must not end the signs of life
                with suppress(Exception):
                    bug = None if exhausted(error) else error
                    LOG.log(level, "what is done every %s seconds failed: %s", seconds, error, exc_info=bug)
                level = logging.DEBUG
            else:
                level = logging.WARNING

    thread = threading.Thread(target=_about(repeat), daemon=True)
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
        thread.join(1.0)  # a call in progress may take longer


def later(seconds: float, act: Callable[[], None]) -> None:
    """Call `act`, which must not raise, after `seconds`, in a thread of its own, unless the process ends before.

    If the system cannot start a thread, it is called at once.
    """
    timer = threading.Timer(seconds, _about(act))
    timer.daemon = True
    try:
        timer.start()
    except (RuntimeError, MemoryError):
        act()


@contextmanager
def within(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, which must not raise, in a thread of its own if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, _about(act))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
