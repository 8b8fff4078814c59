"""A real browser for tests of pages: headless Chromium without a network, which tells what it was asked for.

with browser(tmp_path) as chromium:
    page = Page(chromium, path)
    page.click("button.copy")
    assert page.problems() == []
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name leads anywhere
)  # fmt: skip
MISSING = (
    "{missing} is not on this machine. The pages are tested in a real browser: install Debian's packages chromium and "
    "chromium-driver (`make browser` does it where apt-get and root are there), or put programs of these names on PATH."
)
PATIENCE = 15.0
"""Seconds that a machine under load may take for one step."""


@contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Chrome]:
    """Yield a browser with a new profile in `folder`, a window of this size, and no network."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.fail(MISSING.format(missing=" and ".join(missing)))
    options = ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for argument in (*ARGUMENTS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "localhost,127.0.0.1")  # the driver listens on this machine
        driver = Chrome(options, Service(programs["chromedriver"]))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*", "ws://*", "wss://*"]})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


class Page:
    """A file opened from the disk, and what a reader does with it."""

    def __init__(self, driver: Chrome, path: Path):
        self.driver = driver
        for log in ("browser", "performance"):
            driver.get_log(log)  # what came before is not this page's
        driver.get(path.resolve().as_uri())
        self.wait(self.drawn, "a figure was not drawn")

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what JavaScript gives back."""
        return self.driver.execute_script(script, *arguments)

    def drawn(self) -> bool:
        """Say whether every figure that is seen has been drawn."""
        return self.run(
            "return [...document.querySelectorAll('.figure')].filter((f) => f.offsetParent)"
            ".every((f) => f.dataset.drawn === 'yes')"
        )

    def all(self, selector: str) -> list[WebElement]:
        """Return the elements of a CSS selector that are seen."""
        seen = "(e) => e.checkVisibility({visibilityProperty: true})"
        return self.run(f"return [...document.querySelectorAll(arguments[0])].filter({seen})", selector)

    def one(self, selector: str) -> WebElement:
        """Return the first seen element of a CSS selector."""
        found = self.all(selector)
        assert found, f"nothing to be seen of {selector}"
        return found[0]

    def click(self, target: str | WebElement) -> WebElement:
        """Click an element, brought into view, with the mouse: what covers it would get the click."""
        element = self.one(target) if isinstance(target, str) else target
        self.run("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
        element.click()
        return element

    def texts(self, selector: str) -> list[str]:
        """Return the seen texts of a CSS selector."""
        return self.run("return arguments[0].map((e) => e.textContent)", self.all(selector))

    def wait(self, true: Callable[[], Any], said: str = "") -> Any:
        """Wait until something is true; return it."""
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _: true(), said or "the page did not get there")

    def pasted(self, selector: str) -> str:
        """Return what the clipboard holds, pasted into an empty field of the page, which is empty again then."""
        field = self.one(selector)
        field.send_keys(Keys.CONTROL, "v")
        text = str(field.get_property("value"))
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
        return text

    def resize(self, width: int, height: int = 844) -> None:
        """Give the page another size, as a phone has it; wait until its figures have followed."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.wait(lambda: self.run("return innerWidth") == width)
        self.wait(
            lambda: self.run(
                "return [...document.querySelectorAll('.figure')].filter((f) => f.offsetParent)"
                ".every((f) => Math.abs(f._fullLayout.width - f.clientWidth) < 2)"
            ),
            "a figure kept its old width",
        )

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return self.run("return document.documentElement.scrollWidth - innerWidth")

    def problems(self) -> list[str]:
        """Return errors of the console, and everything that was asked of anybody but the disk."""
        found = [
            entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                params = message["params"]
                url = params["request"]["url"] if "request" in params else params["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    found.append(f"asked for {url}")
        return found
