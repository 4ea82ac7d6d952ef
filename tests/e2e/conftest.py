"""The real stack, and a real browser that may talk to loopback only.

The stack is started once for all tests, as a user would: `kvarena up`. With `KVARENA_E2E_HOME` the tests use the one
that runs there already, and leave it running.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from support.page_steps import opened
from support.running_stack import Stack, started

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
    with started(tmp_path_factory.mktemp("kvarena")) as stack:
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
