"""The report in a real browser: light and dark, wide and as narrow as a phone. Needs no stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser

from kvarena.bench.report import read_files, render
from support.small_eval_result import small_eval_result
from support.small_ttft_result import small_ttft_result

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("report")
    for name, result in (("ttft", small_ttft_result()), ("eval", small_eval_result())):
        (folder / f"{name}.json").write_text(json.dumps(result))
    (folder / "report.html").write_text(render(read_files([str(folder)])))
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize(("scheme", "is_light"), [("light", True), ("dark", False)])
def test_the_page_fits_and_asks_for_nothing(
    browser: Browser, page_url: str, width: int, scheme: Literal["light", "dark"], is_light: bool
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    addresses: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(page_url)
    assert addresses == [page_url]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.querySelectorAll('svg')].every(svg => svg.clientWidth > 250)")
    brightness = "getComputedStyle(document.querySelector('{}')).{}.match(/\\d+/g).slice(0, 3).map(Number)"
    background = page.evaluate(brightness.format("body", "backgroundColor"))
    ink = page.evaluate(brightness.format("svg text", "fill"))
    assert (sum(background) > sum(ink)) == is_light
    assert abs(sum(background) - sum(ink)) > 3 * 128
    page.close()


def test_a_click_on_the_markdown_selects_all_of_it(browser: Browser, page_url: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(page_url)
    details = page.locator("#throughput details")
    details.locator("summary").click()
    details.locator("pre").click()
    assert page.evaluate("getSelection().toString()").strip() == details.locator("pre").inner_text().strip()
    page.close()
