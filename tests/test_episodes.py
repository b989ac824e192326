"""After the next good run every image equals its disk: the short form of the replica matrix (see reliability.py)."""

from __future__ import annotations

import random
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harness.battles import MIB
from harness.episodes import Container, Device, Figures, Folder, episode, good_run, opened

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", [Folder, Device, Container], ids=lambda kind: kind.name.replace(" ", "-"))
def test_a_chunk_that_goes_back_after_a_killed_run_is_in_the_image_by_name(kind: Any, tmp_path: Path) -> None:
    """Killed between the last write and the commit: what was fetched is kept beside the image, which stays.

    test_provider.py has the same for the orchestrator's writers.
    """
    figures = Figures()
    with ExitStack() as ending:
        front = opened_or_skipped(ending, kind, tmp_path / "site")
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


def opened_or_skipped(ending: ExitStack, kind: Any, folder: Path) -> Any:
    """The front; a skip where this machine does not let a test have block devices."""
    try:
        return ending.enter_context(opened(kind, folder))
    except OSError as error:
        if kind is not Device:
            raise
        pytest.skip(f"no loop device can be had here: {error}")
