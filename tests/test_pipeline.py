"""The one threaded map: order, bounds, and how it ends early."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from coriolis_azure.threads import ordered
from harness.constants import DEADLINE


def test_results_come_in_the_order_of_the_items() -> None:
    last_first = [threading.Event() for _ in range(5)]
    last_first[4].set()

    def work(number: int) -> int:
        assert last_first[number].wait(DEADLINE)
        if number:
            last_first[number - 1].set()
        return number

    assert list(ordered(work, range(5), threads=5, ahead=5)) == [0, 1, 2, 3, 4]


def test_no_more_items_are_taken_than_may_be_in_memory() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    for position, _ in enumerate(ordered(lambda item: item, items(), threads=2, ahead=4)):
        assert len(taken) <= position + 4


def test_an_error_is_raised_where_its_result_is_due() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise KeyError(number)
        return number

    results = ordered(work, range(10), threads=3, ahead=5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)


def test_an_error_of_the_items_ends_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(ordered(lambda item: item, items(), threads=1, ahead=4))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_running_work_is_aborted_and_waiting_work_never_begins(error: type[BaseException]) -> None:
    aborted, running, begun, ended = threading.Event(), threading.Event(), [], []

    def work(number: int) -> None:
        begun.append(number)
        running.set()
        assert aborted.wait(DEADLINE)
        ended.append(number)

    def items() -> Iterator[int]:
        yield from range(3)
        assert running.wait(DEADLINE)
        raise error

    with pytest.raises(error):
        list(ordered(work, items(), threads=1, ahead=10, abort=aborted.set))
    assert begun == ended == [0]  # joined, and 1 and 2 were cancelled


def test_closing_it_in_the_middle_aborts_too() -> None:
    aborted = threading.Event()

    def work(number: int) -> int:
        assert number == 0 or aborted.wait(DEADLINE)
        return number

    with closing(ordered(work, range(9), threads=2, ahead=3, abort=aborted.set)) as results:
        assert next(results) == 0
    assert aborted.is_set()


def test_abort_is_not_called_when_all_went_well() -> None:
    aborted = threading.Event()
    assert list(ordered(str, [1, 2], threads=2, ahead=8, abort=aborted.set)) == ["1", "2"]
    assert not aborted.is_set()


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with closing(ordered(str, range(100), threads=4, ahead=8)) as results:
        next(results)
    assert threading.active_count() == before
