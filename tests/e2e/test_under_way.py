"""A person at the page while answers are under way: grows, stops, reloads.

The page and the browser are real, and so are the servers' HTTP and the way that a generation ends with its client. Only
the tokens come as the test lets them, so that an answer is under way for as long as the test needs it to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from support.lmcache_server import LMCacheServer
from support.page_steps import ANSWER_MS, answer_text, ask, expect_states, figures, opened, page_over
from support.real_server import serving
from support.scripted_engine import Pace, ScriptedEngine
from support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = ("a", "b")
Engines = dict[str, ScriptedEngine]


@pytest.fixture
def engines() -> Engines:
    return {name: ScriptedEngine(options_model=None, pace=Pace()) for name in NAMES}


@pytest.fixture
def contenders(engines: Engines) -> Iterator[list[dict[str, str]]]:
    with ExitStack() as servers:
        urls = {name: servers.enter_context(serving(engine)).url for name, engine in engines.items()}
        yield [{"name": name, "title": name.upper(), "url": url} for name, url in urls.items()]


@pytest.fixture
def page(contenders: list[dict[str, str]], browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page over these engines, without documents."""
    with page_over(contenders, tmp_path) as url, opened(browser, url) as page:
        yield page


def let(engines: Engines, num_tokens: int) -> None:
    for engine in engines.values():
        assert engine.pace
        engine.pace.let(num_tokens)


def end(engines: Engines) -> None:
    for engine in engines.values():
        assert engine.pace
        engine.pace.end()


def texts(page: Page) -> dict[str, str]:
    return {name: answer_text(page, name) for name in NAMES}


def until_longer(page: Page, than: dict[str, str]) -> dict[str, str]:
    wait_until(lambda: all(len(text) > len(than[name]) for name, text in texts(page).items()))
    return texts(page)


def test_both_panes_grow_at_the_same_time(page: Page, engines: Engines) -> None:
    ask(page, "What does everybody keep?")
    seen = dict.fromkeys(NAMES, "")
    for _ in range(5):
        let(engines, 20)
        seen = until_longer(page, seen)
        expect_states(page, a="streaming", b="streaming")
    end(engines)
    expect_states(page, a="done", b="done")
    assert all(figures(page, name)["num_output_tokens"] == 101 for name in NAMES), "the end token is one"


def test_stop_keeps_what_had_arrived_and_the_chat_goes_on(page: Page, engines: Engines) -> None:
    ask(page, "What does everybody drink?")
    let(engines, 50)
    seen = until_longer(page, dict.fromkeys(NAMES, ""))
    page.locator(".st-key-in-sequence label").first.click()
    let(engines, 50)
    until_longer(page, seen)
    page.locator(".st-key-in-sequence label").first.click()
    page.locator(".st-key-stop button").click()
    expect_states(page, a="interrupted", b="interrupted")
    kept = texts(page)
    assert all(len(kept[name]) > len(seen[name]) for name in NAMES)
    wait_until(lambda: not any(engine.open for engine in engines.values()))

    end(engines)
    ask(page, "And what does nobody drink?")
    expect_states(page, a="done", b="done")
    expect(page.get_by_test_id("question")).to_have_count(2)
    for name in NAMES:
        assert page.get_by_test_id(f"answer-{name}").first.inner_text().strip() == kept[name]


def test_an_answer_goes_on_after_a_reload_and_ends_with_the_last_page(page: Page, engines: Engines) -> None:
    ask(page, "What does everybody collect?")
    let(engines, 20)
    seen = until_longer(page, dict.fromkeys(NAMES, ""))
    expect(page).to_have_url(re.compile("chat="))
    page.reload()
    expect_states(page, a="streaming", b="streaming")
    let(engines, 20)
    seen = until_longer(page, seen)
    url = page.url
    page.goto("about:blank")
    wait_until(lambda: not any(engine.open for engine in engines.values()))
    page.goto(url)
    expect_states(page, a="interrupted", b="interrupted")
    expect(page.get_by_test_id("question")).to_have_text(["What does everybody collect?"])
    assert all(text.startswith(seen[name]) for name, text in texts(page).items())


@pytest.mark.timeout(600)
def test_the_servers_are_seen_while_they_answer(
    engines: Engines, contenders: list[dict[str, str]], browser: Browser, tmp_path: Path
) -> None:
    with LMCacheServer(tmp_path, l1_gb=0.25) as lmcache, ExitStack() as parts:
        store = {"name": "lmcache-server", "title": "LMCache server", "url": lmcache.http_url}
        page = parts.enter_context(opened(browser, parts.enter_context(page_over(contenders, tmp_path, [store]))))
        ask(page, "What does everybody wear?")
        let(engines, 20)
        seen = until_longer(page, dict.fromkeys(NAMES, ""))
        page.get_by_text("See the servers").click()
        cards = {name: page.get_by_test_id(f"watched-{name}") for name in (*NAMES, store["name"])}
        for name in NAMES:
            expect(cards[name]).to_contain_text("1 running, 0 waiting", timeout=ANSWER_MS)
            expect(cards[name]).to_contain_text("iB of memory")
            expect(cards[name]).to_contain_text("No log line of this request yet.")
        expect(cards["lmcache-server"]).to_contain_text("healthy · ")
        expect(cards["lmcache-server"]).to_contain_text("store: 0 entries, 0.0 MiB of 256.0 MiB")

        lmcache.kill()
        expect(cards["lmcache-server"]).to_contain_text("Nothing answers at", timeout=ANSWER_MS)
        for _ in range(3):
            let(engines, 20)
            seen = until_longer(page, seen)
        expect_states(page, a="streaming", b="streaming")
        page.get_by_label("Only figures with").fill("_ms")
        page.get_by_label("Only figures with").press("Enter")
        end(engines)
        expect_states(page, a="done", b="done")
        for name in NAMES:
            expect(cards[name].get_by_test_id("log-line").locator("dt")).to_contain_text(["ttft_ms", "total_ms"])
            expect(cards[name]).to_contain_text("0 running, 0 waiting")

        draft, box = "And what does nobody", page.get_by_test_id("stChatInputTextArea")
        box.fill(draft)
        lmcache.start()
        expect(cards["lmcache-server"]).to_contain_text("healthy · ", timeout=ANSWER_MS)
        expect(box).to_have_value(draft)
        expect(box).to_be_focused()


def test_a_blind_turn_in_two_tabs_is_voted_on_exported_and_comes_back_after_a_restart(
    engines: Engines, contenders: list[dict[str, str]], browser: Browser, tmp_path: Path
) -> None:
    with page_over(contenders, tmp_path) as url, opened(browser, url) as page:
        page.locator(".st-key-blind label").first.click()
        with opened(browser, page.url) as other:
            ask(page, "What does everybody plant?")
            let(engines, 20)
            expect(other.get_by_test_id("question")).to_have_text(["What does everybody plant?"])
        page.wait_for_timeout(1000)
        assert all(engine.open for engine in engines.values()), "the tab that is left watches on"
        expect(page.get_by_test_id("answer-A")).to_have_text("…")
        end(engines)
        expect_states(page, A="done", B="done")
        expect(page.get_by_test_id("pane-b")).to_have_count(0)
        page.get_by_role("button", name="B is best").click()
        expect_states(page, a="done", b="done")
        seen = texts(page)
        expect(page.locator(".st-key-votes")).to_be_visible()
        page.locator(".st-key-share button").first.click()
        link = page.get_by_test_id("stPopoverBody").get_by_test_id("stCode").inner_text().strip()
        with page.expect_download() as download:
            page.get_by_role("button", name="curl commands").click()
        assert f"{contenders[0]['url']}/v1/chat/completions" in download.value.path().read_text()
        assert link.startswith(f"{url}?chat=")

    with page_over(contenders, tmp_path) as url, opened(browser, f"{url}/?{link.partition('?')[2]}") as page:
        expect(page.get_by_test_id("question")).to_have_text(["What does everybody plant?"])
        assert texts(page) == seen
        expect(page.locator(".st-key-blind input")).to_be_checked()
        expect(page.get_by_text("Your vote: B, ")).to_be_visible()
