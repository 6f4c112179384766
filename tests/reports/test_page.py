"""What a reader does with the page of a search, in the machine's Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reports.search_report import ReportPaths

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install it")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox wants rights that a container does not give.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: "Browser", searched: ReportPaths) -> "Iterator[Page]":
    """Show the page with all figures drawn; whatever it asks of a network or logs fails."""
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    address = searched.html.as_uri()
    wrong: list[str] = []
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("request", lambda request: wrong.append(request.url))
    shown.goto(address)
    shown.evaluate("boxes.forEach(draw)")
    wait_until(shown, "document.querySelectorAll('.figure .main-svg').length > 10")
    yield shown
    inner = ("data:", "blob:", address)
    assert [text for text in wrong if not text.startswith(inner)] == []
    shown.close()


def wait_until(page: "Page", condition: str) -> None:
    """Wait for a condition; Playwright's own wait needs what the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def rows(page: "Page", column: int) -> list[str]:
    cells = page.locator(f"#table-of-trials tbody tr:not([hidden]) td:nth-child({column})")
    return cells.all_inner_texts()


def colours(page: "Page") -> Any:
    font = "document.querySelector('[data-figure^=history]').layout.font.color"
    return page.evaluate(f"[getComputedStyle(document.body).color, {font}]")


def test_a_pointer_on_a_trial_shows_its_settings(page: "Page") -> None:
    box = page.locator("[data-figure^=history]")
    box.scroll_into_view_if_needed()
    box.locator(".scatterlayer .point").first.hover(force=True)
    shown = page.locator("[data-figure^=history] .hoverlayer")
    shown.locator(".hovertext").first.wait_for()
    for words in ("trial 0", "base_lr = 0.01", "84.6 %"):
        assert words in str(shown.text_content())


def test_trials_are_sorted_and_filtered(page: "Page") -> None:
    head = page.locator("#table-of-trials th button", has_text="accuracy")
    head.click()
    first = [float(text.removesuffix(" %")) for text in rows(page, 3) if text != "–"]
    assert first == sorted(first, reverse=True) and len(rows(page, 1)) == 40
    head.click()
    assert rows(page, 3)[0].removesuffix(" %") == f"{min(first)}"
    page.fill("#filter", "pruned resnet18")
    assert set(rows(page, 2)) == {"pruned"}
    assert page.inner_text("#n-shown") == str(len(rows(page, 1)))


def test_dark_mode_changes_text_and_figures(page: "Page") -> None:
    light = colours(page)
    page.emulate_media(color_scheme="dark")
    figure = "document.querySelector('[data-figure^=history]')"
    wait_until(page, f"{figure}.layout.font.color !== '{light[1]}'")
    assert colours(page)[0] != light[0]


def test_a_narrow_screen_does_not_scroll_sideways(page: "Page") -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    wait_until(page, "document.documentElement.scrollWidth === 400")


def test_it_prints_with_all_figures(page: "Page", tmp_path: Path) -> None:
    path = tmp_path / "page.pdf"
    page.pdf(path=path)
    assert path.stat().st_size > 50_000
