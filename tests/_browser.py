"""Debian's Chromium without a window, for a test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is absent")


@dataclass
class View:
    """A tab; said: its console, errors and dialogs; asked: every address that it asked for."""

    tab: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def browsing(*, width: int, color_scheme: str = "light", seconds: float = 90) -> Iterator[View]:
    """Open a tab of a new browser; its waits end after `seconds`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        scheme: Any = color_scheme
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.set_default_timeout(seconds * 1000)
        view = View(tab)
        tab.on("console", lambda message: view.said.append(message.text))
        tab.on("pageerror", lambda error: view.said.append(str(error)))
        tab.on("dialog", lambda dialog: view.said.append(dialog.message))
        tab.on("request", lambda request: view.asked.append(request.url))
        try:
            yield view
        finally:
            browser.close()
