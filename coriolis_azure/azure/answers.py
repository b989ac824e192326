"""Answers of Azure that are the same for many VMs: asked for once, however many threads want them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from ..clock import Clock
from ..threads import Lock

P = ParamSpec("P")
R = TypeVar("R")


class Answers:
    """Answers, each kept for `seconds`; at 0, which it is at first, none is kept. Thread-safe. Errors are not kept."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = 0.0
        self._clock, self._lock = clock, Lock()
        self._turns: dict[tuple[Any, ...], Lock] = {}
        self._kept: dict[tuple[Any, ...], tuple[float, Any]] = {}

    def of(self, question: tuple[Any, ...], ask: Callable[[], R]) -> R:
        """The answer to a question: the one that is kept, or what `ask` returns."""
        if not self.seconds:
            return ask()
        with self._lock:
            turn = self._turns.setdefault(question, Lock())
        with turn:
            until, kept = self._kept.get(question, (0.0, None))
            now = self._clock.monotonic()
            if question in self._kept and now < until:
                return cast(R, kept)
            answer = ask()
            self._kept[question] = now + self.seconds, answer
            return answer

    def forget(self) -> None:
        """Ask everything anew."""
        with self._lock:
            self._kept.clear()


class _Answering(Protocol):
    answers: Answers


A = TypeVar("A", bound=_Answering)


def same_for_all(method: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R]:
    """A method whose answer does not depend on a VM: its object's `answers` may keep it."""

    @wraps(method)
    def asked(self: A, /, *arguments: P.args, **options: P.kwargs) -> R:
        question = (method.__name__, *arguments, *options.items())
        return self.answers.of(question, lambda: method(self, *arguments, **options))

    return asked
