"""A person at the page while answers are under way: grows, stops, reloads.

The page and the browser are real, and so are the servers' HTTP and the way that a generation ends with its client. Only
the tokens come as the test lets them, so that an answer is under way for as long as the test needs it to be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from support.lmcache_server import free_port
from support.page_steps import answer_text, ask, expect_states, figures, opened, until
from support.real_server import serving
from support.scripted_engine import Pace, ScriptedEngine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

FRONTEND = Path(__file__).resolve().parents[2] / "frontend"
NAMES = ("a", "b")
Engines = dict[str, ScriptedEngine]


@pytest.fixture
def engines() -> Engines:
    return {name: ScriptedEngine(options_model=None, pace=Pace()) for name in NAMES}


@pytest.fixture
def page(engines: Engines, browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page over these engines, without documents."""
    port = free_port()
    with ExitStack() as servers:
        urls = {name: servers.enter_context(serving(engine)).url for name, engine in engines.items()}
        contenders = [{"name": name, "title": name.upper(), "url": url} for name, url in urls.items()]
        settings = {"KVARENA_CONTENDERS": json.dumps(contenders), "KVARENA_DATA_DIR": str(tmp_path)}
        command = [sys.executable, "-m", "streamlit", "run", str(FRONTEND / "app.py"), "--server.headless", "true"]
        command += ["--server.address", "127.0.0.1", "--server.port", str(port), "--browser.gatherUsageStats", "false"]
        with subprocess.Popen(command, cwd=FRONTEND, env=os.environ | settings) as process:
            try:
                until(lambda: answers(f"http://127.0.0.1:{port}/_stcore/health"))
                with opened(browser, f"http://127.0.0.1:{port}") as page:
                    yield page
            finally:
                process.terminate()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


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
    until(lambda: all(len(text) > len(than[name]) for name, text in texts(page).items()))
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
    assert all(figures(page, name)["num_output_tokens"] == 100 for name in NAMES)


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
    until(lambda: not any(engine.open for engine in engines.values()))

    end(engines)
    ask(page, "And what does nobody drink?")
    expect_states(page, a="done", b="done")
    expect(page.get_by_test_id("question")).to_have_count(2)
    for name in NAMES:
        assert page.get_by_test_id(f"answer-{name}").first.inner_text().strip() == kept[name]


def test_reload_in_the_middle_keeps_the_partial_turn(page: Page, engines: Engines) -> None:
    ask(page, "What does everybody collect?")
    let(engines, 50)
    seen = until_longer(page, dict.fromkeys(NAMES, ""))
    page.reload()
    expect_states(page, a="interrupted", b="interrupted")
    expect(page.get_by_test_id("question")).to_have_text(["What does everybody collect?"])
    assert all(text.startswith(seen[name]) for name, text in texts(page).items())
    until(lambda: not any(engine.open for engine in engines.values()))
