"""Draws the pictures of the README from a real run of the demo: `python -m docs.make_pictures`. Needs Chromium.

`demo.svg` is what the demo prints, drawn by rich. `status.png` is the page of `status --html` of the demo's replica, as
Chromium shows it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).with_name("pictures")
WIDTH = 78
PROGRAM = [sys.executable, "-m", "coriolis_azure"]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=1100,780",
)
# rich's own, without the fonts that it would fetch from the web.
SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def demo(kept: Path) -> str:
    """What a demo prints; its folder is kept."""
    wide = {**os.environ, "COLUMNS": str(WIDTH), "FORCE_COLOR": "1"}
    line = [*PROGRAM, "demo", "--keep", str(kept)]
    return subprocess.run(line, env=wide, check=True, stdout=subprocess.PIPE, text=True).stdout


def draw(told: str) -> str:
    """What was printed, as SVG."""
    console = Console(record=True, width=WIDTH, file=Path(os.devnull).open("w"))  # noqa: SIM115 - until the end
    console.print("$ coriolis-azure demo")
    console.print(Text.from_ansi(told.rstrip()))
    return console.export_svg(title="coriolis-azure demo", theme=MONOKAI, code_format=SVG, unique_id="demo")


def photograph(replica: Path, browser: str) -> None:
    """The page of a replica, as a browser shows it."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        subprocess.run(
            [*PROGRAM, "status", str(replica), "--html", str(page)], check=True, stdout=subprocess.DEVNULL
        )
        kept = (f"--user-data-dir={folder}/profile", f"--screenshot={HERE / 'status.png'}")
        subprocess.run([browser, *FLAGS, *kept, page.as_uri()], check=True, timeout=120)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        (HERE / "demo.svg").write_text(draw(demo(Path(place) / "demo")), encoding="utf-8")
        found = next(Path(place).rglob("replica.json"))
        photograph(found.parent, shutil.which("chromium") or "chromium-browser")
