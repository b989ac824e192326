"""After the next good run every image equals its disk: the short form of the replica matrix (see reliability.py)."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from harness.battles import MIB
from harness.episodes import Container, Device, Figures, Folder, episode, good_run, opened

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", [Folder, Device, Container], ids=lambda kind: kind.name.replace(" ", "-"))
def test_a_chunk_that_goes_back_after_a_killed_run_is_in_the_image_by_name(kind, tmp_path: Path) -> None:
    """Killed between the last write and the commit: what was fetched is kept beside the image, which stays.

    test_provider.py has the same for the orchestrator's writers.
    """
    figures = Figures()
    with open_or_skip(kind, tmp_path / "site") as front:
        site = front.site
        good_run(front, figures)
        older = site.disks()["os"]
        newer = random.Random(1).randbytes(MIB // 2) + older[MIB // 2 :]
        site.write("os", newer)
        site.ill = ("uncommitted", 0)
        assert front.replicate() == -signal.SIGKILL
        with front.images()["os"].open("rb") as image:
            assert image.read(MIB) == older
        assert front.clean() == []
        site.write("os", older)
        good_run(front, figures)
        assert figures.wrong == []
        assert site.left() == []


def test_whatever_happens_the_next_good_run_puts_it_right(tmp_path: Path) -> None:
    """A few rounds of the matrix; all of it is in the long form."""
    figures = Figures()
    with opened(Folder, tmp_path / "site") as front:
        episode(front, ["destination full"], figures, random.Random(3))
    assert figures.wrong == []
    assert figures.images >= 4


def open_or_skip(kind, folder: Path):
    """The front; a skip where this machine does not let a test have block devices."""
    try:
        context = opened(kind, folder)
        front = context.__enter__()
    except OSError as error:
        if kind is not Device:
            raise
        pytest.skip(f"no loop device can be had here: {error}")
    return _Entered(front, context)


class _Entered:
    """What is entered already, for a `with`."""

    def __init__(self, front, context) -> None:
        self._front, self._context = front, context

    def __enter__(self):
        return self._front

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
