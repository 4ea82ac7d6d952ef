"""What the chat shows in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ai100.chat_session import TAGS, ChatSession, Reply
from ai100.engine import AI100Engine
from ai100.slots import Status

HELP = """Ask anything. Every topic of the conversation has a KV slot of its own.
  stats           what was saved, and what lies in the slots
  help, ?         this
  quit, exit, q   leave"""


def ask_and_show(chat: ChatSession, question: str, console: Console, *, verbose: bool) -> Reply:
    reply = chat.ask(question, lambda text: console.print(text, end="", markup=False, highlight=False))
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
        tokens = f"{row['position']:,} of {engine.max_model_len:,}"
        table.add_row(str(row["slot"]), row["topic"] or "", tokens if row["topic"] else "", str(row["last_used"] or ""))
    return table


def totals(cached: Sequence[Reply], uncached: Sequence[Reply], console: Console) -> None:
    """Of a whole comparison."""
    with_it, without = (sum(reply.total_ms for reply in replies) for replies in (cached, uncached))
    saved = f"{len(cached)} turns: {with_it:,.0f} ms with the cache, {without:,.0f} ms without"
    console.print(f"{saved}; saved {without - with_it:,.0f} ms", highlight=False)
