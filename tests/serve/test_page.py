"""The page in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amclr.search.index import Index
from tests.serve.conftest import EVIL, SCRIPT, TOKEN, png, search_directly, serving

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def watched(page: Any, address: str) -> list[str]:
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    return faults


@pytest.mark.slow
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, chromium: Any) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue", 1))
    (tmp_path / "none.png").write_text("no image")
    with serving(folder, "--rate", "0") as (_, address):
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        faults = watched(page, address)
        page.goto(address)
        page.wait_for_selector("text=Describe what the image shows")
        status = "#hits [role=status]"

        def after(act: Callable[[], Any], text: str) -> str:
            act()
            page.wait_for_selector(f"{status}:has-text('{text}')", timeout=30_000)
            return str(page.inner_text("#hits"))

        def ask(text: str) -> None:
            page.fill("#text input, #text textarea", text)
            page.keyboard.press("Enter")

        index = Index(folder)
        first = after(lambda: ask("a red patch"), "Results 1 to 24")
        assert "for “a red patch”" in first
        for hit, card in zip(
            search_directly(index, "a red patch", k=24), page.query_selector_all("#hits li"), strict=True
        ):
            assert hit.name in card.inner_text()
            assert float(card.inner_text().split()[0]) == pytest.approx(hit.score, abs=6e-4)
            assert hit.captions[0].replace("\n", " ") in card.inner_text()
        page.wait_for_function("[...document.querySelectorAll('#hits img')].slice(0, 4).every(i => i.naturalWidth > 0)")
        assert page.is_disabled("#back") and page.is_enabled("#on")
        after(lambda: page.click("#on"), "Results 25 to 48")
        after(lambda: page.click("#on"), "Results 49 to 61")
        assert page.is_disabled("#on")
        after(lambda: page.click("#back"), "Results 25 to 48")
        page.focus("#hits li:nth-child(3) button")
        name = page.inner_text("#hits li:nth-child(3) .line span")
        like = after(lambda: page.keyboard.press("Enter"), "for the image")
        assert f"for the image {name}" in like and name not in page.inner_text("#hits ol")
        page.click("text=Narrow down")
        page.fill("#only input, #only textarea", "BLUE")
        blue = after(lambda: page.keyboard.press("Enter"), "Results 1 to 1")
        assert f"for the image {name}" in blue and "red" not in page.inner_text("#hits ol")
        page.fill("#only input, #only textarea", "")
        page.click("text=Narrow down")

        after(lambda: ask(""), "The search is empty")
        after(lambda: ask("  "), "The search is empty")
        after(lambda: ask("?!… ☃"), "There is no word in that")
        after(lambda: ask("a" * 3000), "at most 2000 characters, got 3000")
        after(lambda: ask("a -" + " -".join("bcdefghijk")), "at most 8 negatives")
        after(lambda: ask(SCRIPT), "Results 1 to 24")
        page.click("text=Narrow down")
        page.fill("#only input, #only textarea", "onerror")
        only = after(lambda: page.keyboard.press("Enter"), "Results 1 to 1")
        assert EVIL in only and SCRIPT in only, "names and captions are shown as they are"
        page.fill("#only input, #only textarea", "nothing has this")
        after(lambda: page.keyboard.press("Enter"), "Nothing found")
        page.fill("#only input, #only textarea", "")
        after(lambda: page.keyboard.press("Enter"), "Results 1 to 24")
        page.fill("#text input, #text textarea", "")
        upload = after(lambda: page.set_input_files("#image input", tmp_path / "blue.png"), "your image")
        assert "Results 1 to 24 for your image" in upload
        assert page.is_visible("#image img")
        both = after(lambda: ask("a red patch"), "and your image")
        assert both != upload
        page.click("#image button")
        page.wait_for_selector("#image >> text=Drop an image")
        after(lambda: page.set_input_files("#image input", tmp_path / "none.png"), "cannot be decoded")
        page.click("#image button")
        paste = """async () => {
            const canvas = document.createElement('canvas');
            canvas.width = canvas.height = 50;
            const blob = await new Promise(done => canvas.toBlob(done));
            const data = new DataTransfer();
            data.items.add(new File([blob], 'a.png', {type: 'image/png'}));
            document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        }"""
        after(lambda: ask(""), "The search is empty")
        after(lambda: page.evaluate(paste), "your image")
        assert page.title() == "Search images" and not faults

        phone = chromium.new_page(viewport={"width": 360, "height": 740})
        faults = watched(phone, address)
        phone.goto(address)
        phone.click("#examples button >> nth=0")
        phone.wait_for_selector(f"{status}:has-text('Results 1 to 24')")
        width = "document.documentElement.scrollWidth"
        assert phone.evaluate(width) <= 360, "nothing lies outside"
        cards = [phone.locator("#hits li").nth(k).bounding_box() for k in range(2)]
        assert cards[0]["y"] == cards[1]["y"] and cards[0]["width"] > 140, "two beside each other"
        assert phone.locator("#hits").bounding_box()["y"] < 740, "some of them are seen without scrolling"
        assert not faults


@pytest.mark.slow
def test_the_page_asks_for_the_token(folder: Path, chromium: Any) -> None:
    with serving(folder, "--token", TOKEN) as (_, address):
        page = chromium.new_page()
        page.goto(address)
        page.fill("input[name=token]", "not it")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Wrong token")
        page.fill("input[name=token]", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#text")
        page.fill("#text input, #text textarea", "a red patch")
        page.keyboard.press("Enter")
        page.wait_for_selector("#hits li")
        page.wait_for_function("document.querySelector('#hits img').naturalWidth > 0")
