"""The report of a comparison in a real browser: what can be clicked is clicked, and the page follows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from reporting import made_up
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from browsing import Page, browser
from rankworks.compare.report import write_report
from rankworks.compare.result import CompareResult

COLLIDING = """
const seen = [...document.querySelectorAll('.figure')].filter((f) => f.offsetParent);
const found = [];
for (const figure of seen) {
  const frame = figure.getBoundingClientRect();
  const boxes = [...figure.querySelectorAll('.annotation-text, .xtick text, .ytick text, .xtitle, .ytitle')]
    .map((e) => [e.textContent, e.getBoundingClientRect()]);
  boxes.forEach(([text, a], i) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom + 1) found.push(text + ' out');
    for (const [other, b] of boxes.slice(i + 1)) {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 2) found.push(text + ' over ' + other);
    }
  });
}
return found
"""
NAMES = """
return [...document.querySelectorAll('#costs [role=tabpanel]:not([hidden]) .annotation-text')].map((e) => e.textContent)
"""
PICKED = "return document.getElementById('rates').data.filter((t) => t.opacity === 1).map((t) => t.meta.arm)"


def names(page: Page) -> list[str]:
    """The points of the cost figure that have their name beside them."""
    return page.run(NAMES)


def settled(page: Page) -> None:
    """Names follow a figure that has come to rest."""
    page.wait(page.drawn)
    time.sleep(0.6)


@pytest.mark.slow
def test_forty_methods_can_be_clicked_through(tmp_path: Path) -> None:
    result = made_up(40)
    path = write_report(result, tmp_path)
    with browser(tmp_path) as driver:
        page = Page(driver, path)
        assert page.problems() == []
        assert page.overflow() == 0
        the_table_sorts_searches_and_unfolds(page, result)
        the_views_of_cost_change(page, result)
        the_curves_follow_what_is_picked(page, result)
        the_matrix_is_that_of_the_chosen_method(page, result)
        it_fits_a_phone_and_the_dark(page)
        assert page.problems() == []


def the_table_sorts_searches_and_unfolds(page: Page, result: CompareResult) -> None:
    rows = {row.method: row for row in result.leaderboard}

    def order() -> list[str]:
        return page.run("return [...document.getElementById('board').tBodies].map((b) => b.dataset.arm)")

    heads = {head.text.split()[0]: head for head in page.all("#board .sort")}
    assert order() == list(rows)
    for head, value in (
        ("trained", lambda row: row.trainable_parameters), ("memory", lambda row: row.memory_bytes),
        ("lr", lambda row: row.lr), ("method", lambda row: row.method),
    ):  # fmt: skip
        for falling in (False, True):
            page.click(heads[head])
            known = [value(rows[label]) for label in order() if value(rows[label]) is not None]
            if head != "method":
                assert known == sorted(known, reverse=falling), head
                assert [label for label in order() if value(rows[label]) is None] == order()[len(known) :]
            else:
                assert known[0] == (max if falling else min)(known)
    page.click(heads["#"])
    assert order() == list(rows)

    assert page.all("#board .more") == []
    page.click("#board .open")
    assert page.one("#board .more").text.count("rank 8 was solved") == (1 if result.arm(order()[0]).notes else 0)
    first = rows[order()[0]]
    button = page.click("#board .more .copy")
    page.wait(lambda: button.text == "copied")
    assert page.pasted("#search") == first.command
    second = rows[order()[1]]
    button = page.click(page.all("#board tbody td > .copy")[1])
    page.wait(lambda: button.text == "copied")
    assert page.pasted("#search") == second.command
    page.click("#board .open")
    assert page.all("#board .more") == []

    page.one("#search").send_keys("VERA")
    assert page.texts("#board .open") == ["vera"]
    page.one("#search").send_keys("\b" * 4)
    assert len(page.all("#board .open")) == len(rows)


def the_views_of_cost_change(page: Page, result: CompareResult) -> None:
    seen = set()
    for tab in page.all("#costs [role=tab]"):
        page.click(tab)
        settled(page)
        assert tab.get_attribute("aria-selected") == "true"
        assert len(page.all("#costs [role=tabpanel]")) == 1
        assert page.run(COLLIDING) == []
        assert result.baseline in names(page)
        assert 15 <= len(names(page)) <= 39
        seen.add(page.one("#costs .xtitle").text)
    assert len(seen) == 3
    points = len(page.all("#costs .scatterlayer .point"))
    entry = next(e for e in page.driver.find_elements(By.CSS_SELECTOR, "#costs .traces") if "behind it" in e.text)
    page.click(entry.find_element(By.CSS_SELECTOR, ".legendtoggle"))
    page.wait(lambda: len(page.all("#costs .scatterlayer .point")) < points)


def the_curves_follow_what_is_picked(page: Page, result: CompareResult) -> None:
    shown = set(page.run(PICKED))
    pressed = {chip.get_attribute("data-arm") for chip in page.all(".chip[aria-pressed=true]")}
    assert shown == pressed
    assert result.baseline in pressed
    other = page.click(".chip[aria-pressed=false]")
    page.wait(lambda: other.get_attribute("data-arm") in page.run(PICKED))
    page.click(other)
    page.wait(lambda: set(page.run(PICKED)) == shown)
    settled(page)
    views = page.all("#curve [role=tab]")
    assert len(views) == 4
    for tab in views[1:]:
        page.click(tab)
        page.wait(page.drawn)
        assert len(page.all("#curve [role=tabpanel]")) == 1
    choice = Select(page.one("#tried"))
    choice.select_by_visible_text("vera")
    wanted = {f"{trial.lr:.3g}" for trial in result.arm("vera").trials}
    page.wait(lambda: {text.split()[0] for text in page.texts("#trials .legendtext")} == wanted)
    lines = len(page.all("#trials .scatterlayer .js-line"))
    page.click("#trials .legendtoggle")
    page.wait(lambda: len(page.all("#trials .scatterlayer .js-line")) < lines)
    page.click("#pick-none")
    page.click(views[0])
    page.wait(lambda: page.run(PICKED) == [])
    for chip in page.all(".chip[data-arm]")[:9]:
        page.click(chip)
    page.wait(lambda: len(set(page.run(PICKED))) == 9)
    lines = page.run(
        "return document.getElementById('rates').data.filter((t) => t.meta.part === 'line' && t.opacity === 1)"
        ".map((t) => t.line.color + t.line.dash)"
    )
    assert len(set(lines)) == len(lines) > 5


def the_matrix_is_that_of_the_chosen_method(page: Page, result: CompareResult) -> None:
    before = page.one(".confusion").text
    Select(page.one("#confused")).select_by_visible_text("lora-xs")
    assert len(page.all(".confusion")) == 1
    assert page.one(".confusion").text != before
    right = sum(rerun.confusion.counts[0][0] for rerun in result.arm("lora-xs").reruns if rerun.confusion)
    assert page.one(".confusion td").text == str(right)


def it_fits_a_phone_and_the_dark(page: Page) -> None:
    wide = len(page.all("#board thead th"))
    page.resize(390)
    settled(page)
    assert page.overflow() == 0
    assert 3 <= len(page.all("#board thead th")) < wide
    assert page.run(COLLIDING) == []
    ink = page.run("return document.getElementById('rates').layout.font.color")
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page.wait(lambda: page.run("return document.getElementById('rates').layout.font.color") != ink)
    page.resize(1280)
    settled(page)
    assert page.overflow() == 0


@pytest.mark.slow
def test_four_methods_are_all_named(tmp_path: Path) -> None:
    path = write_report(CompareResult.from_file(Path(__file__).with_name("example.json")), tmp_path)
    with browser(tmp_path, 390, 844) as driver:
        page = Page(driver, path)
        for width in (390, 1280):
            page.resize(width)
            settled(page)
            assert page.overflow() == 0
            assert set(names(page)) == {"lora", "pissa", "vera"}
            assert page.run(COLLIDING) == []
        button = page.click("#again .copy")
        page.wait(lambda: button.text == "copied")
        page.click("summary")
        assert "methods:" in page.one("#again details pre").text
        assert page.problems() == []
