"""The HTML pages, in text and in a real browser: complete, quiet, legible, and safe with what others have named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.change_map import Tally
from coriolis_azure.cli import pages
from coriolis_azure.cli.pages import graphics
from coriolis_azure.cli.reporting import reporting
from coriolis_azure.errors import InvalidInput, OutputLost
from coriolis_azure.replica.history import History
from coriolis_azure.replica.survey import Surveyed
from coriolis_azure.timeline import RunReport, StepTaken
from harness import browser
from harness.browser import Browser
from harness.constants import MIB
from harness.reports import NOW, a_fleet, a_map, a_replica, a_report

EVIL = "<script>alert(1)</script>\"'&\x1b[31m\u202egpj.exe\u2066\x00\n{{ 7 * 7 }}<img src=x onerror=alert(2)>"
TIB = 1 << 40

PAGES = {
    "one": lambda: pages.of_replicas([replace(a_replica(1), name="")], NOW),
    "fleet": lambda: pages.of_replicas(a_fleet(12), NOW),
    "large": lambda: pages.of_replicas(a_fleet(60), NOW),
    "run": lambda: pages.of_runs([a_report()], NOW),
    "failed": lambda: pages.of_runs([a_report(failed=True)], NOW),
    "runs": lambda: pages.of_runs([a_report(), a_report("db-1", failed=True)], NOW),
    "evil": lambda: pages.of_replicas(
        [evil(), replace(evil(), name=f"{EVIL}2", error=EVIL, remedy=EVIL)], NOW
    ),
    "evil run": lambda: pages.of_runs([evil_run()], NOW),
}


def evil_run() -> RunReport:
    step = StepTaken(EVIL, EVIL, EVIL, 0.0, 5.0, ((EVIL, 3.0),))
    run = a_report(EVIL, failed=True)
    disk = replace(run.disks[0], name=EVIL, mechanism=EVIL, tier=EVIL, reason=EVIL)
    return replace(
        run, error=EVIL, remedy=EVIL, mechanism=EVIL, point=EVIL, started=EVIL, steps=(step,), disks=(disk,),
        notices=(EVIL,), left_behind=(EVIL,), maps={EVIL: a_map(MIB, 1)},
    )  # fmt: skip


def evil() -> Surveyed:
    history = History((evil_run(),), EVIL, {EVIL: a_map(MIB, 1)})
    return replace(
        a_replica(1), name=EVIL, place=EVIL, vm=EVIL, point=EVIL, points=(EVIL,), disks=(EVIL,), history=history,
        unfinished=EVIL, drafts=(EVIL,),
    )  # fmt: skip


class Outline(HTMLParser):
    """The tags of a page, each with its attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.tags if each == tag]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_complete_in_itself_and_has_its_landmarks(page: str) -> None:
    text = PAGES[page]()
    outline = Outline(text)
    assert not {"script", "iframe", "img", "object", "embed", "form", "base"} & {
        tag for tag, _ in outline.tags
    }
    references = [
        (name, value)
        for _, attributes in outline.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data") or name.startswith("on")
    ]
    assert {value for _, value in references if value is not None and value[:1] != "#"} == {"data:,"}
    assert set(re.findall(r"url\((.*?)\)", text)) <= {f"#p-{name}" for name in (
        "relied", "checked", "destination", "limit", "grid")}  # fmt: skip
    assert "@import" not in text
    for tag in ("header", "main", "footer", "h1", "title"):
        assert len(outline.all(tag)) == 1
    assert outline.all("html") == [{"lang": "en"}]
    assert len(outline.all("table")) == len(outline.all("caption"))
    assert all(cell.get("scope") in ("col", "row") for cell in outline.all("th"))
    for drawing in outline.all("svg"):
        assert drawing.get("aria-hidden") == "true" or (
            drawing.get("role"),
            bool(drawing.get("aria-label")),
        ) == (
            "img",
            True,
        )
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {value for _, value in references if value and value[0] == "#"} <= {f"#{id}" for id in ids}


@pytest.mark.parametrize("page", ["evil", "evil run"])
def test_text_of_others_is_cleaned_and_escaped(page: str) -> None:
    text = PAGES[page]()
    assert set(filter(lambda letter: not letter.isprintable(), text)) <= {"\n"}
    assert "<script>" not in text
    assert "<img" not in text
    assert "alert(1)" in Outline(text).text
    assert "{{ 7 * 7 }}" in Outline(text).text
    assert r"\u202e" in text


def test_a_large_map_says_what_a_cell_stands_for_and_which_are_mixed() -> None:
    tally = Tally(32 * TIB, MIB)
    tally.add("zero", 0, 32 * MIB - 1)
    tally.add("changed", 32 * MIB - 1, 1)
    text = pages.of_runs([replace(a_report(), maps={"os": tally.map()})], NOW)
    shown = " ".join(Outline(text).text.split())
    assert "Each cell stands for 128 GiB" in shown
    assert "1 cell of 256 is mixed" in shown
    assert "1 MiB (< 1 %) written by this run" in shown
    assert "(> 99 %) only zeros" in shown
    drawn = graphics.drawing(tally.map(), 32)
    assert drawn.paths["changed"] == "M310 78h10v2h-10z"  # in the last cell, below
    assert graphics.drawing(tally.map(), 64, 64).cells == 64


def test_the_page_of_five_hundred_vms_is_at_most_3_mib() -> None:
    """In full it is measured by benchmarks/status.py."""
    assert len(pages.of_replicas(a_fleet(25), NOW).encode()) / 25 * 500 < 3 * MIB


def test_a_report_is_written_even_if_the_command_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, gone = tmp_path / "run.html", tmp_path / "folder"

    def interrupted(
        file: Path, report: RunReport, error: type[BaseException] | None = KeyboardInterrupt
    ) -> None:
        with reporting(file) as take:
            take(report)
            if gone.exists():
                gone.rmdir()
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        interrupted(page, a_report(failed=True))
    assert "could not be restored" in page.read_text()
    with pytest.raises(InvalidInput, match="cannot be written"), reporting(tmp_path / "no/run.html"):
        pytest.fail("too late")
    gone.mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted(gone / "run.html", a_report())
    assert "the report is not written" in capsys.readouterr().err
    gone.mkdir()
    with pytest.raises(OutputLost, match="the command succeeded") as lost:
        interrupted(gone / "run.html", a_report(), None)
    assert lost.value.remedy == "Create its folder first, or give another file."
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputLost, match="No such device"):  # nobody reads it, and may never do
        interrupted(tmp_path / "pipe", a_report(), None)
    (tmp_path / "pipe").unlink()
    with reporting(tmp_path / "none.html"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"run.html"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = browser.program()
    if program is None:
        pytest.skip("Chromium is not installed: apt install chromium")
    with browser.opened(program) as page:
        yield page


# The contrast of each text with what is behind it, by the rules of WCAG; of small text at least 4.5.
CONTRAST = """(() => {
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b };
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c } return [255, 255, 255] };
const bad = [];
for (const e of document.querySelectorAll("body *")) {
  if (e.closest("svg") || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) bad.push(e.tagName + " " + e.className + " " + e.textContent.slice(0, 30)) }
return bad })()"""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_in_a_browser_a_page_is_quiet_and_fits(chromium: Browser, tmp_path: Path, page: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGES[page](), encoding="utf-8")
    for width in (360, 1280):
        for dark in (False, True):
            chromium.open(file, width=width, dark=dark)
            chromium.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
            assert chromium.evaluate("[...document.images, ...document.scripts].length") == 0
            assert chromium.evaluate(CONTRAST) == []
            assert chromium.complaints() == []
            assert set(chromium.requested()) <= {file.as_uri(), "data:,"}
            assert chromium.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    colours: list[Any] = [chromium.evaluate("getComputedStyle(document.body).backgroundColor")]
    chromium.open(file)
    colours.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2
    assert chromium.screenshot().startswith(b"\x89PNG")
    assert chromium.pdf().startswith(b"%PDF")


@pytest.mark.slow
def test_the_filter_hides_what_needs_no_attention_without_a_script(chromium: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGES["fleet"](), encoding="utf-8")
    chromium.open(file)
    visible = (
        "[...document.querySelectorAll('tbody tr')].filter(r => r.offsetParent && r.closest('.fleet')).length"
    )
    assert chromium.evaluate(visible) == 12
    chromium.evaluate("document.querySelector('#attention').click()")
    assert chromium.evaluate(visible) == 3
