"""What is large takes no more than it may: the short form of the load (see reliability.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_4_tib_with_content_everywhere_take_less_than_128_mib_first_and_again(tmp_path: Path) -> None:
    """One chunk in 16 of the whole disk; the program itself compares its memory with the limit."""
    program = Path(__file__).with_name("loads.py")
    for run in ("full", "incremental"):
        line = [sys.executable, str(program), "sparse", str(tmp_path / "load"), "128"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"4 TiB, {run}: peak of the host" in done.stdout
