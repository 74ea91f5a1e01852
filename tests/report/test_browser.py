"""The report in real Chromium, and proof that the look at it can fail."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from orchestrate.report.page import write_report
from tests.report import browser
from tests.report.browser import BrowserError, inspect_page, screenshot
from tests.report.conftest import FakeSweep

SOUND = """<!DOCTYPE html><meta charset="utf-8"><title>t</title>
<style>body { margin: 8px; font: 16px/1.5 sans-serif }</style>"""
OUTSIDE = "http://127.0.0.1:9/a.png"  # nobody listens there
DEFECTS = {
    "<p>below</p><p style='margin-top:-34px'>above</p>": ["text over text: below | above"],
    "<svg width=90 height=40><text y=20>left</text><text x=9 y=20>right</text></svg>": ["text over text: left | right"],
    "<svg width=90 height=40><text x=70 y=20>too far right</text></svg>": ["text cut off: too far right"],
    "<script>console.error('oh no')</script>": ["console error: oh no"],
    "<script>undefinedName()</script>": ["console error: ReferenceError: undefinedName"],
    "<img src='missing.png' width=40 height=40>": [
        "picture without size or content: missing.png",
        "console error: Failed to load resource: net::ERR_FILE_NOT_FOUND",
    ],
    "<svg id=flat width=0 height=40><path/></svg>": ["picture without size or content: flat"],
    "<svg id=blank width=40 height=40></svg>": ["picture without size or content: blank"],
    "<div style='width:900px'>wide</div>": ["page is 408 pixels wider than the window"],
    f"<img src='{OUTSIDE}' width=4 height=4>": [
        f"picture without size or content: {OUTSIDE}",
        f"request to the outside: {OUTSIDE}",
        "console error: Failed to load resource: net::ERR_",
    ],
}


@pytest.mark.parametrize("width", [1200, 400])
def test_report_is_in_order_in_a_real_browser(study: FakeSweep, width: int) -> None:
    study.write()
    page = write_report(study.sweep_dir, study.trials_dir, study.root / "report")
    facts = inspect_page(page, width)
    assert facts.problems == ()
    assert facts.width == width
    # 8 figures of the metric, 5 of the losses, 24 samples in legends; a table row is many texts.
    assert facts.num_pictures == 37
    assert facts.num_texts > 1000


def test_report_of_a_half_finished_sweep_is_in_order(sweep: FakeSweep) -> None:
    sweep.name = "<b>half</b> & a_very_long_name_without_any_space_in_it_" * 3
    sweep.finish(sweep.add("barlow_twins_with_a_rather_long_name", 8192, 5), 0.8)
    for seed, state in enumerate(("training", "failed", "diverged", "stopped")):
        sweep.status(sweep.add("disco", 64, 300, seed), state)
    sweep.write()
    page = write_report(sweep.sweep_dir, sweep.trials_dir, sweep.root / "report")
    assert inspect_page(page, 400).problems == ()


def test_sound_page_has_no_problems(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"{SOUND}<p>one</p><p>two <b>three</b> <code>four</code></p><svg width=9 height=9><path/></svg>")
    facts = inspect_page(page, 500)
    assert facts.problems == ()
    assert (facts.num_texts, facts.num_pictures) == (4, 1)


def test_each_defect_of_a_page_is_reported_once_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(SOUND + "".join(DEFECTS))
    found = inspect_page(page, 500).problems
    expected = [problem for problems in DEFECTS.values() for problem in problems]
    assert len(found) == len(expected)
    assert [problem for problem in expected if not any(text.startswith(problem) for text in found)] == []


def test_text_scrolled_out_of_its_box_is_not_over_its_neighbour(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    box = "<div style='width:90px; overflow-x:auto; white-space:nowrap'>a long line that goes on and on</div>"
    page.write_text(f"{SOUND}<div style='display:flex'>{box}<div>beside</div></div>")
    assert inspect_page(page, 500).problems == ()


def test_screenshot_is_a_picture_of_the_asked_width(study: FakeSweep, tmp_path: Path) -> None:
    page, png = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(f"{SOUND}<p style='height:1500px'>tall</p>")
    screenshot(page, png, 640)
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 640
    assert height > 1500


def test_missing_browser_is_an_error_and_no_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrowserError, match="apt-get install chromium"):
        browser.find_chromium()
