"""The reports in a real Chromium without a window: what a reader sees, reads aloud, and reaches with the keyboard."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.reporting.report import write_report
from quickbloom.server_app.runs.directory import RunDirectory, read_history

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'quickbloom[dev]'")

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = os.environ.get("QUICKBLOOM_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if not program:
        pytest.skip("needs Chromium: `sh tests/programs.sh` installs Debian's, or name one in QUICKBLOOM_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        # Root, as in containers, has no sandbox.
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "one": of a run with hostile names; "two": of two runs."""
    root = tmp_path_factory.mktemp("browser")
    for name in ("reptile", "maml"):
        settings = {"algorithm": name, "rounds": 2, "evaluate-every": 1, "adapt-steps": 2, "output-dir": str(root / name)}
        config = parse_run_config(settings)
        run_federation(LoopbackGrid(2, config.flat()), config)
    lines = read_history(root / "maml")
    lines[0]["failures"] = [{"who": f"node {HOSTILE}", "reason": HOSTILE}, {"who": "node 7", "reason": "x" * 600}]
    RunDirectory(root / "maml").write_rounds(lines)
    table = (root / "maml" / "per_task.csv").read_text()
    hostile = '"' + HOSTILE.replace('"', '""') + '"'
    (root / "maml" / "per_task.csv").write_text(re.sub(r"device-\d+,test", f"{hostile},test", table, count=1))
    two = [root / "reptile", root / "maml"]
    return {"one": write_report(root / "maml", None), "two": write_report(two, root / "two.html")}


class Opened:
    """A page, and what it complained about."""

    def __init__(self, browser: Any, report: Path, **how: Any) -> None:
        self.page = browser.new_page(**how)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())

    def run(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_errors_or_sideways_scrolling_and_its_pictures_show(
    browser: Any, reports: dict[str, Path], which: str, viewport: Any, scheme: Any, tmp_path: Path
) -> None:
    opened = Opened(browser, reports[which], viewport=viewport, color_scheme=scheme)
    assert opened.complaints == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [reports[which].as_uri()]
    assert opened.run("document.title") != "taken"
    assert opened.run("document.scripts.length") == 0
    assert opened.run("document.documentElement.scrollWidth") == viewport["width"]
    pictures = opened.run("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt, i.currentSrc])")
    assert len(pictures) >= 3
    assert all(complete and width > 100 and alt for complete, width, alt, _ in pictures)
    # The other half of every pair is not shown.
    shown = opened.run("getComputedStyle(document.body).backgroundColor")
    assert shown == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 22, 26)"}[scheme]
    other = Opened(browser, reports[which], viewport=viewport, color_scheme={"light": "dark", "dark": "light"}[scheme])
    assert not {source for *_, source in pictures} & set(other.run("[...document.images].map(i => i.currentSrc)"))
    assert len(opened.page.screenshot(path=tmp_path / "page.png", full_page=True)) > 10_000


def test_tab_reaches_every_link_fold_and_scrolling_part_in_the_order_of_the_page(
    browser: Any, reports: dict[str, Path]
) -> None:
    opened = Opened(browser, reports["one"], viewport=PHONE)
    wanted = opened.run(
        "[...document.querySelectorAll('a, summary, [tabindex]')].filter(e => e.checkVisibility())"
        ".map((e, i) => (e.dataset.at = i, i))"
    )
    reached = []
    for _ in wanted:
        opened.page.keyboard.press("Tab")
        reached.append(int(opened.run("document.activeElement.dataset.at ?? -1")))
        outline = opened.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    assert reached == wanted
    assert opened.run("[...document.querySelectorAll('[tabindex]')].every(e => e.getAttribute('aria-label'))")


def test_the_keyboard_opens_a_fold_and_follows_a_link(browser: Any, reports: dict[str, Path]) -> None:
    opened = Opened(browser, reports["one"], viewport=DESK)
    opened.page.locator("summary").first.focus()
    opened.page.keyboard.press("Enter")
    assert opened.run("document.querySelector('details').open")
    opened.page.locator("nav a[href='#clients']").focus()
    opened.page.keyboard.press("Enter")
    assert opened.run("location.hash") == "#clients"


def test_a_screen_reader_finds_headings_landmarks_tables_and_pictures_by_name(browser: Any, reports: dict[str, Path]) -> None:
    tree = Opened(browser, reports["one"], viewport=DESK).page.locator("body").aria_snapshot()
    for part in ('heading "maml on digits, seed 0" [level=1]', 'navigation "Sections"', "main", 'heading "Clients" [level=2]'):
        assert part in tree
    assert re.search(r'img "Step by step: test clients, steps of adaptation: \d', tree)
    assert 'table "Held-out clients, before and after"' in tree
    assert 'columnheader "worst 10 % after"' in tree
    assert 'rowheader "test (11)"' in tree


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser: Any, reports: dict[str, Path], scheme: Any) -> None:
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 between text and what is behind it."""
    opened = Opened(browser, reports["one"], viewport=DESK, color_scheme=scheme)
    pairs = opened.run("""() => {
        const behind = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } return null; };
        const seen = new Set();
        for (const e of document.querySelectorAll('body *')) {
            if ([...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.checkVisibility())
                seen.add(JSON.stringify([getComputedStyle(e).color, behind(e)])); }
        return [...seen]; }""")
    assert pairs
    for text, back in map(json.loads, pairs):
        assert contrast(text, back) >= 4.5, (text, back)


def contrast(one: str, other: str) -> float:
    """The ratio of two colours as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
