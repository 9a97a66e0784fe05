"""Laws of the report in a browser: it opens without a word on the console or the network, every
figure is there, and it reads on a phone and in the dark.

The screenshots stay in $MINIDALLE2_ARTEFACTS where that is set.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _report_run import write_rich_run

from eval.html_report.page import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs the Debian package chromium: make test-system installs it"
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MIN_CONTRAST = 4.5  # of text that is not large: WCAG 2.1, 1.4.3
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a] = channels(getComputedStyle(e).backgroundColor);
      if (a === 255) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const text = channels(element.closest("svg") ? style.fill : style.color).slice(0, 3);
    const [light, dark] = [luminance(text), luminance(behind(element))].sort((a, b) => b - a);
    found.push([(light + 0.05) / (dark + 0.05), walker.currentNode.textContent.trim()]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_rich_run(tmp_path_factory.mktemp("page"))
    return write_report(run, [run / "eval.json"])


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("MINIDALLE2_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def opened(browser: Any, report: Path, size: dict[str, int], scheme: str) -> tuple[Any, list[str]]:
    """Open the report, and list every word on the console and every request but for itself."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: heard.append(f"request: {request.url[:60]}"))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    inline = ("request: data:image/", f"request: {report.as_uri()[:60]}")
    return page, [line for line in heard if not line.startswith(inline)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_opens_silently_with_every_figure_at_any_width(
    browser: Any, report: Path, size: dict[str, int], scheme: str, artefacts: Path
):
    page, heard = opened(browser, report, size, scheme)
    assert heard == []
    pictures = page.evaluate(
        "[...document.images].map((i) => [i.complete, i.naturalWidth, i.clientWidth, i.alt])"
    )
    assert len(pictures) == 24 + 3 * 4 + 3 * 6 + 2  # samples, two strips, two sheets
    assert all(
        whole and natural > 0 and side > 20 and alt for whole, natural, side, alt in pictures
    )
    charts = page.evaluate("[...document.querySelectorAll('svg')].map((s) => s.clientHeight)")
    assert len(charts) == 14 and all(height > 80 for height in charts)
    wide, window = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide == window  # nothing to scroll sideways but a table in its own box
    page.screenshot(path=artefacts / f"report_{size['width']}_{scheme}.png", full_page=True)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_what_is_behind_it(browser: Any, report: Path, scheme: str):
    page, _ = opened(browser, report, DESKTOP, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [(round(c, 2), text) for c, text in found if c < MIN_CONTRAST] == []
    backdrop = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(v) for v in backdrop[4:-1].split(",")) < 200) is (scheme == "dark")
    page.close()


def test_hostile_captions_stay_words(browser: Any, report: Path):
    page, heard = opened(browser, report, DESKTOP, "light")
    assert heard == []
    assert page.evaluate("document.scripts.length") == 0
    words = page.locator("figcaption", has_text='<script>alert("1")</script>')
    assert words.first.is_visible()
    page.close()


def test_it_prints_on_pages_that_are_not_cut_at_the_side(
    browser: Any, report: Path, artefacts: Path
):
    page, _ = opened(browser, report, DESKTOP, "light")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})  # A4 at 96 a inch, less its margins
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 720
    assert not page.locator("nav").is_visible()
    content = page.pdf(path=artefacts / "report.pdf", format="A4")
    assert content.startswith(b"%PDF") and len(content) > 20_000
    page.close()
