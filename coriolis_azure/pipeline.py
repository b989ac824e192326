"""The only place on the host where this package starts threads, and where what they share gets its lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Lock = threading.Lock
Condition = threading.Condition
T = TypeVar("T")
R = TypeVar("R")


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
    the generator being closed), what had not begun never does, then `abort` is called, which has to make
    running work end soon, and only then are the threads joined. Wrap it in `contextlib.closing` where the
    body of the loop may raise: a generator that is merely dropped ends when it is collected.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            while pending and (len(pending) >= ahead or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:
        for future in pending:
            future.cancel()
        if abort is not None:
            abort()
        raise
    finally:
        pool.shutdown()


def aside(act: Callable[[], None]) -> Callable[[], None]:
    """Do `act` in a thread of its own; what this gives back waits for its end. It must not raise."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread.join


@contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Do `act` again and again while the block runs, `seconds` apart, in a thread of its own. It must not raise."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1.0)  # what it does just now may take its time


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
