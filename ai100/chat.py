"""A chat over an engine in this process: asks, keeps what every turn cost, and shows it in a terminal."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ai100.engine import AI100Engine, AI100Options
from ai100.slots import Status
from kvarena.engines.base import EngineUnavailable, GenerationRequest, Sampling
from kvarena.server.text import StopRule, TextStream

TAGS = {
    Status.NEW_TOPIC: "NEW",
    Status.INCREMENTAL_PREFILL: "INCR",
    Status.RESET_TOPIC: "RESET",
    Status.FULL_PREFILL: "FULL",
}


@dataclass(frozen=True)
class Reply:
    """An answer. `details` are the engine's; times in milliseconds as the caller saw them."""

    question: str
    text: str
    first_token_ms: float
    total_ms: float
    num_tokens: int
    num_prompt_tokens: int
    details: dict[str, Any]

    @property
    def line(self) -> str:
        """`[INCR] Slot 0 | Turn 2 | Prefilled 8 tokens | ...`"""
        told, timings = self.details, self.details["timings"]
        return " | ".join(
            [
                f"[{TAGS[told['status']]}] Slot {told['slot']}",
                f"Turn {told['turn']}",
                f"Prefilled {told['num_prefilled_tokens']} tokens",
                f"First token {self.first_token_ms:,.0f} ms",
                f"Prefill {timings['prefill_ms']:,.0f} ms",
                f"Decode {timings['decode_ms']:,.0f} ms",
                f"Total {self.total_ms:,.0f} ms",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answer": self.text,
            "first_token_ms": round(self.first_token_ms, 3),
            "total_ms": round(self.total_ms, 3),
            "num_prompt_tokens": self.num_prompt_tokens,
            **self.details,
        }


@dataclass
class ChatSession:
    """A conversation of its own; the engine remembers what was said in it, and adds notes where it has some."""

    engine: AI100Engine
    use_cache: bool = True
    replies: list[Reply] = field(default_factory=list)
    _name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] = lambda text: None,
        on_topic: Callable[[str], None] = lambda topic: None,
    ) -> Reply:
        """Greedy. `on_topic` gets the topic, then `on_text` the answer's text as it comes. Raises `ValueError` for what
        can't be served and `EngineUnavailable`; the chat goes on after both.
        """
        generation = self.engine.generate(self._request(question))
        started_s, first_s = perf_counter(), 0.0
        text: TextStream | None = None
        said: list[str] = []
        num_tokens = 0
        try:
            for token in generation:
                if not num_tokens:
                    first_s = perf_counter()
                    on_topic(generation.report.texts["topic"])
                num_tokens += 1
                text = text or TextStream(self.engine.tokenizer, generation.prompt_token_ids, StopRule())
                said.append(text.push(token).text)
                on_text(said[-1])
        finally:
            generation.close()
        ended_s = perf_counter()
        reply = Reply(
            question,
            "".join(said),
            1e3 * ((first_s or ended_s) - started_s),
            1e3 * (ended_s - started_s),
            num_tokens,
            generation.report.num_prompt_tokens,
            {**generation.report.texts, **generation.report.details},
        )
        self.replies.append(reply)
        return reply

    def _request(self, question: str) -> GenerationRequest:
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt="",
            sampling=Sampling(temperature=0.0),
            add_special_tokens=False,
            messages=({"role": "user", "content": question},),
            conversation_id=self._name,
            options=AI100Options(use_cache=self.use_cache),
        )


HELP = """Ask anything. Every topic of the conversation has a KV slot of its own.
  stats           what was saved, and what lies in the slots
  help, ?         this
  quit, exit, q   leave"""


def ask_and_show(chat: ChatSession, question: str, console: Console, *, verbose: bool) -> Reply:
    def write(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False)

    def label(topic: str) -> None:
        if not verbose:
            write(f"[{topic[:1].upper()}{topic[1:]}] ")

    reply = chat.ask(question, write, label)
    console.print()
    console.print(reply.line, style="dim", markup=False, highlight=False, soft_wrap=True)
    if verbose:
        told = reply.details
        reason = f" ({told['reason']})" if told["reason"] else ""
        said = f"  topic {told['topic']!r}, {told['status']}{reason}, {reply.num_prompt_tokens} tokens of prompt"
        said += f"\n  notes {told['notes']}" if told["notes"] else ""
        console.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
    return reply


def show_comparison(cached: Reply, uncached: Reply, console: Console) -> None:
    """The same question with and without the cache, side by side."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("")
    for name in ("with the cache", "without", "times"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, with_it, without in (
        ("prefilled tokens", *(reply.details["num_prefilled_tokens"] for reply in (cached, uncached))),
        ("first token, ms", cached.first_token_ms, uncached.first_token_ms),
        ("total, ms", cached.total_ms, uncached.total_ms),
    ):
        table.add_row(name, f"{with_it:,.0f}", f"{without:,.0f}", f"{without / max(with_it, 1e-9):,.1f}")
    console.print(table)
    same = "the same answer" if cached.text == uncached.text else f"ANOTHER ANSWER without: {uncached.text}"
    console.print(same, markup=False, highlight=False)


def show_stats(chat: ChatSession, console: Console) -> None:
    replies = chat.replies
    counts = Counter(TAGS[Status(reply.details["status"])] for reply in replies)
    prompt = sum(reply.num_prompt_tokens for reply in replies)
    prefilled = sum(reply.details["num_prefilled_tokens"] for reply in replies)
    kinds = ", ".join(f"{count} {tag}" for tag, count in counts.items()) or "none yet"
    console.print(f"Turns: {len(replies)} ({kinds})", markup=False, highlight=False)
    console.print(f"Prompt tokens: {prompt:,}; prefilled {prefilled:,}, saved {prompt - prefilled:,}", highlight=False)
    console.print(slots_table(chat.engine))


def slots_table(engine: AI100Engine) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in ("slot", "topic", "tokens", "last used"):
        table.add_column(name, justify="left" if name == "topic" else "right", no_wrap=True)
    for row in engine.slot_rows():
        tokens = f"{row.position:,} of {engine.max_model_len:,}" if row.topic else ""
        table.add_row(str(row.slot), row.topic or "", tokens, str(row.last_used or ""))
    return table


def totals(cached: Sequence[Reply], uncached: Sequence[Reply], console: Console) -> None:
    """Of a whole comparison."""
    with_it, without = (sum(reply.total_ms for reply in replies) for replies in (cached, uncached))
    saved = f"{len(cached)} turns: {with_it:,.0f} ms with the cache, {without:,.0f} ms without"
    console.print(f"{saved}; saved {without - with_it:,.0f} ms", highlight=False)


class ChatLoop:
    """`chats`: the one that is shown, and with `--compare` its twin without the cache."""

    def __init__(self, chats: list[ChatSession], console: Console, verbose: bool) -> None:
        self.chats = chats
        self._console = console
        self._verbose = verbose

    def batch(self, messages: list[str]) -> bool:
        """Whether one failed."""
        failed = False
        for message in messages:
            self._console.print(f"> {message}", style="bold", markup=False, highlight=False)
            failed |= not self._ask(message)
        self._show_end()
        return failed

    def interactive(self) -> bool:
        self._console.print(HELP, markup=False, highlight=False)
        while True:
            try:
                line = self._console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                line = "quit"
            match line.lower():
                case "quit" | "exit" | "q":
                    self._show_end()
                    return False
                case "stats" | "status":
                    show_stats(self.chats[0], self._console)
                case "help" | "?":
                    self._console.print(HELP, markup=False, highlight=False)
                case "":
                    continue
                case _:
                    self._ask(line)

    def _ask(self, message: str) -> bool:
        """Whether it was answered. Ctrl-C ends an answer and not the chat."""
        shown, *twins = self.chats
        try:
            reply = ask_and_show(shown, message, self._console, verbose=self._verbose)
            for twin in twins:
                show_comparison(reply, twin.ask(message), self._console)
        except KeyboardInterrupt:
            self._console.print("\n(stopped)")
        except (ValueError, EngineUnavailable) as error:
            self._console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return False
        return True

    def _show_end(self) -> None:
        if len(self.chats) == 2:
            totals(self.chats[0].replies, self.chats[1].replies, self._console)
