"""The page over small servers that answer at once, so that many can be shown."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page

from support.page_steps import settle
from support.small_openai_server import OFFER, SmallServer

NAMES = ("blend", "plain", "third", "fourth", "fifth", "sixth")
TITLE = "vLLM + a long way to say {}"
ANSWER = ["The", " mayor", " is", " Ann", ", who", " keeps", " bees", "."]
OpenPage = Callable[..., Page]


def small_servers(count: int) -> list[SmallServer]:
    return [SmallServer(pieces=ANSWER, offer=OFFER), *(SmallServer(pieces=ANSWER) for _ in range(count - 1))]


def choose(page: Page, label: str, name: str) -> None:
    box = page.get_by_role("combobox", name=label)
    box.click()
    box.fill(name)
    page.get_by_role("option", name=name).first.click()
    settle(page)
