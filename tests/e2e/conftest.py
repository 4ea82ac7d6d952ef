"""The real stack, and a real browser that may talk to loopback only.

The stack is started once for all tests, as a user would: `kvarena up`. It is the one whose servers compile the model.
With `KVARENA_E2E_HOME` the tests use the one that runs there already, and leave it running.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from support.page_steps import opened, page_over
from support.running_stack import Stack, started
from support.small_openai_server import SmallServer, report_of
from support.small_page import NAMES, TITLE, OpenPage

expect.set_options(timeout=30_000)

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if running := os.environ.get("KVARENA_E2E_HOME"):
        yield Stack(Path(running), os.environ.get("KVARENA_API_KEY", ""))
        return
    with started(tmp_path_factory.mktemp("kvarena"), compiles=True) as stack:
        yield stack


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next((found for name in BROWSER_NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(stack: Stack, browser: Browser) -> Iterator[Page]:
    with opened(browser, stack.address("page")) as page:
        yield page


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    """The page over these servers, with three documents."""
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"This is {name}. " + f"The {name} of them is a word. " * 20)
    with ExitStack() as parts:

        def open_over(*servers: SmallServer) -> Page:
            contenders = []
            for name, server in zip(NAMES, servers, strict=False):
                parts.callback(server.stop)
                title = TITLE.format(name)
                contenders.append({"name": name, "title": title, "url": server.url, "report": report_of(server)})
            url = parts.enter_context(page_over(contenders, tmp_path))
            return parts.enter_context(opened(browser, url))

        yield open_over
