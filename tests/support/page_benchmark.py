"""What an update of the page costs, by the number of turns in the chat: `python tests/support/page_benchmark.py`.

The page and the browser are real; six small servers give the answers. Figures: the bytes that the page sends for a
click anywhere, for a whole question and for each update (a message to the browser) while answers stream; the processor
time that the page's process takes for each redraw (all updates of one tick) meanwhile, which includes reading the
answers; and the time that a click takes until the page is at rest again. Lengths of chats are measured in turn, round
by round, so that a busy machine hits all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "frontend")]

from playwright.sync_api import Browser, Page, WebSocket, expect, sync_playwright  # noqa: E402

from chat import Answer, Chat, Context, Turn  # noqa: E402
from chat_file import ChatFile  # noqa: E402
from chat_view import TICK_S  # noqa: E402
from contender_api import Sampling  # noqa: E402
from figures import Figures  # noqa: E402
from kvarena.documents import TextChunk  # noqa: E402
from settings import Contender  # noqa: E402
from support.page_steps import ANSWER_MS, page_over, settle  # noqa: E402
from support.small_openai_server import OFFER, SmallServer, report_of  # noqa: E402
from tokens import Span  # noqa: E402

NUM_CONTENDERS = 6
NUM_CHUNKS = 32
CHUNK_WORDS = 500  # a token each, for the small server's tokenizer: 16,000 in all
ANSWER_WORDS = 80
WORD_S = 0.04  # so that answers stream for longer than they are looked at
STREAMED_MS = 1000
NUM_TURNS = (1, 50)
NUM_ROUNDS = 3


class Message(NamedTuple):
    came_s: float
    num_bytes: int


@dataclass
class Traffic:
    """What the page's process sent to one browser tab."""

    messages: list[Message] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        def watch_socket(socket: WebSocket) -> None:
            socket.on("framereceived", lambda payload: self.messages.append(Message(time.perf_counter(), len(payload))))

        page.on("websocket", watch_socket)

    @contextmanager
    def since(self) -> Iterator[list[Message]]:
        """The messages that came meanwhile, filled in at the end."""
        start, found = len(self.messages), list[Message]()
        yield found
        found += self.messages[start:]


def num_bytes(messages: Sequence[Message]) -> int:
    return sum(message.num_bytes for message in messages)


def num_redraws(messages: Sequence[Message]) -> int:
    """What came together is one: between two there is a tick."""
    return sum(later.came_s - earlier.came_s > TICK_S / 2 for earlier, later in pairwise(messages)) + bool(messages)


def page_process() -> psutil.Process:
    """The one that `page_over` started last."""
    forks = next(child for child in psutil.Process().children() if child.cmdline()[-1].endswith("page_forks.py"))
    return forks.children()[-1]


def cpu_ms(process: psutil.Process) -> float:
    times = process.cpu_times()
    return 1000 * (times.user + times.system)


def small_servers() -> list[SmallServer]:
    words = [f" word{index}" for index in range(ANSWER_WORDS)]
    offers = [OFFER] + [None] * (NUM_CONTENDERS - 1)
    return [SmallServer(pieces=words, offer=offer, delay_s=WORD_S) for offer in offers]


def contenders_of(servers: Sequence[SmallServer]) -> list[dict[str, Any]]:
    return [
        {"name": f"c{index}", "title": f"Contender {index}", "url": server.url, "report": report_of(server)}
        for index, server in enumerate(servers)
    ]


def chunks() -> list[TextChunk]:
    texts = (" ".join(f"w{chunk}x{word}" for word in range(CHUNK_WORDS)) for chunk in range(NUM_CHUNKS))
    return [TextChunk(f"text-{index:02}", text) for index, text in enumerate(texts)]


def chat_of(num_turns: int, contenders: Sequence[dict[str, Any]]) -> Chat:
    """Every contender has answered every turn, over all chunks."""
    context = Context("Be brief.", tuple(chunks()), OFFER["separator"])
    chat = Chat()
    for at in range(num_turns):
        turn = Turn.ask(f"Question {at}?", context, [Contender(**one) for one in contenders], Sampling())
        for index, answer in enumerate(turn.answers.values()):
            _fill(answer, is_exact=index > 0)
        chat.turns.append(turn)
    return chat


def _fill(answer: Answer, is_exact: bool) -> None:
    num_tokens = NUM_CHUNKS * CHUNK_WORDS
    sources = ("computed",) if is_exact else ("reused", "computed") * NUM_CHUNKS
    size = num_tokens // len(sources)
    answer.state, answer.finish_reason = "done", "stop"
    answer.text = " ".join(f"word{index}" for index in range(ANSWER_WORDS))
    answer.figures = Figures(
        first_token_ms=4000.0 if is_exact else 500.0,
        total_ms=5000.0,
        num_output_tokens=ANSWER_WORDS,
        num_prompt_tokens=num_tokens,
        num_reused_tokens=0 if is_exact else num_tokens // 2,
        num_recomputed_tokens=0,
        num_computed_tokens=num_tokens if is_exact else num_tokens // 2,
        approximate=not is_exact,
        spans=tuple(Span(index * size, (index + 1) * size, source) for index, source in enumerate(sources)),
    )


@dataclass
class Costs:
    """Of one chat, a figure per round."""

    num_turns: int
    click_ms: list[float] = field(default_factory=list)
    click_bytes: list[int] = field(default_factory=list)
    question_bytes: list[int] = field(default_factory=list)
    update_bytes: list[float] = field(default_factory=list)
    num_updates: list[int] = field(default_factory=list)
    redraw_cpu_ms: list[float] = field(default_factory=list)
    num_redraws: list[int] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        medians = {name: median(found) for name, found in vars(self).items() if name != "num_turns"}
        return {"num_turns": self.num_turns, **medians}


def measure(page: Page, traffic: Traffic, process: psutil.Process, costs: Costs) -> None:
    """A click that changes nothing in the chat; then a question that all contenders answer."""
    toggle = page.locator(".st-key-in-sequence label").first
    for _ in range(2):
        with traffic.since() as sent:
            started_s = time.perf_counter()
            toggle.click()
            app = page.get_by_test_id("stApp")
            page.wait_for_function("document.querySelector('.stApp').dataset.testScriptState == 'running'")
            expect(app).to_have_attribute("data-test-script-state", "notRunning", timeout=60_000)
            costs.click_ms.append(1000 * (time.perf_counter() - started_s))
        costs.click_bytes.append(num_bytes(sent))
    box = page.get_by_test_id("stChatInputTextArea")
    question = f"And then, after {len(costs.question_bytes)} rounds?"
    with traffic.since() as sent:
        box.fill(question)
        box.press("Enter")
        expect(page.get_by_test_id("question").last).to_have_text(question, timeout=ANSWER_MS)
        expect(page.get_by_test_id("pane-c0").last).to_have_attribute("data-state", "streaming", timeout=ANSWER_MS)
        with traffic.since() as streamed:
            before_ms = cpu_ms(process)
            page.wait_for_timeout(STREAMED_MS)
            used_ms = cpu_ms(process) - before_ms
        for index in range(NUM_CONTENDERS):
            pane = page.get_by_test_id(f"pane-c{index}").last
            expect(pane).to_have_attribute("data-state", "done", timeout=ANSWER_MS)
        settle(page)
    costs.question_bytes.append(num_bytes(sent))
    costs.num_updates.append(len(streamed))
    costs.update_bytes.append(num_bytes(streamed) / max(len(streamed), 1))
    costs.num_redraws.append(num_redraws(streamed))
    costs.redraw_cpu_ms.append(used_ms / max(costs.num_redraws[-1], 1))


def run(browser: Browser, home: Path, num_turns: Sequence[int], num_rounds: int) -> list[dict[str, float]]:
    """A row for each length of a chat."""
    with ExitStack() as parts:
        servers = small_servers()
        for server in servers:
            parts.callback(server.stop)
        contenders = contenders_of(servers)
        for chunk in chunks():
            (home / f"{chunk.name}.txt").write_text(chunk.text)
        os.environ |= {"KVARENA_HOME": str(home / "state"), "KVARENA_CHUNK_TOKENS": str(100 * CHUNK_WORDS)}
        file, chats = ChatFile(home / "state" / "chats.db"), [chat_of(count, contenders) for count in num_turns]
        for chat in chats:
            file.keep(chat)
        url = parts.enter_context(page_over(contenders, home))
        process = page_process()
        found = [Costs(count) for count in num_turns]
        for _ in range(num_rounds):
            for chat, costs in zip(chats, found, strict=True):
                page, traffic = browser.new_page(viewport={"width": 1440, "height": 900}), Traffic()
                traffic.watch(page)
                page.goto(f"{url}/?chat={chat.key}")
                expect(page.get_by_test_id("question")).not_to_have_count(0, timeout=60_000)
                settle(page)
                measure(page, traffic, process, costs)
                page.close()
        return [costs.row() for costs in found]


def main() -> None:
    path = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as home:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for row in run(browser, Path(home), NUM_TURNS, NUM_ROUNDS):
            print(json.dumps(row))
        browser.close()


if __name__ == "__main__":
    main()
