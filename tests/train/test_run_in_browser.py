"""The report of a run in a real browser: it opens from the disk without a network, draws, copies, and fits a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_run_report import finished_run

from browsing import Page, browser
from rankworks.train.report import write_report


@pytest.mark.slow
def test_a_run_s_report_opens_and_can_be_clicked(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", steps=60)
    path = write_report(tmp_path / "run", "rankworks train mine.yaml")
    with browser(tmp_path) as driver:
        page = Page(driver, path)
        assert len(page.all(".figure .main-svg")) >= 2
        assert page.overflow() == 0

        lines = len(page.all(".scatterlayer .js-line"))
        page.click(".legendtoggle")
        page.wait(lambda: len(page.all(".scatterlayer .js-line")) < lines)

        for button in page.all(".copy"):
            text = button.find_element("xpath", "..").find_element("tag name", "pre").text
            page.click(button)
            page.wait(lambda button=button: button.text == "copied")
            page.run("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
            assert page.pasted("#paste").split() == text.split()
            page.run("document.getElementById('paste').remove()")

        wide = page.run("return document.querySelector('.figure').clientWidth")
        page.resize(390)
        assert page.run("return document.querySelector('.figure').clientWidth") < wide
        assert page.overflow() == 0

        ink = page.run("return document.querySelector('.figure').layout.font.color")
        scheme = {"name": "prefers-color-scheme", "value": "dark"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.wait(lambda: page.run("return document.querySelector('.figure').layout.font.color") != ink)
        assert page.problems() == []
