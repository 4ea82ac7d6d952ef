"""`kvarena ai100 chat`: multi-turn chat on KV slots in a terminal, with the engine in this process.

Heavy imports are inside the commands.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ai100.cli_options import SettingsMaker, with_settings

if TYPE_CHECKING:
    from rich.console import Console

    from ai100.chat import ChatSession
    from ai100.engine import AI100Engine


MAX_CONTEXT = 800
"""Of a topic in the terminal, as in Qualcomm's original."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Multi-turn chat on the KV slots of an AI 100.")


@app.callback()
def group() -> None:
    """Keeps `chat` a command of its own, though it is the only one here; `kvarena.cli` adds `demo`."""


@app.command()
@with_settings
def chat(
    make_settings: SettingsMaker,
    messages: Annotated[list[str] | None, typer.Argument(help="With --batch: the messages, in order.")] = None,
    batch: Annotated[bool, typer.Option("--batch", "-b", help="Ask the given messages, then exit.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Prefill the whole history on every turn.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask with and without the cache; times side by side.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Topic, status and reason of every turn; the log.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --batch: print JSON on standard output.")] = False,
) -> None:
    """Chat; every topic keeps its KV slot, and a follow-up prefills only what is new."""
    from rich.console import Console

    from ai100.settings import START_ERRORS, open_engine

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    console = Console(stderr=as_json)
    try:
        _check_mode(messages or [], batch=batch, as_json=as_json, no_cache=no_cache, compare=compare)
        settings = make_settings(sets_aside=compare)  # without --compare all turns are alike: topics have all slots
        if settings.own.max_context is None:
            settings = replace(settings, own=replace(settings.own, max_context=MAX_CONTEXT))
        engine = open_engine(settings)
    except START_ERRORS as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    talk = _ChatLoop.over(engine, console, compare=compare, use_cache=not no_cache, verbose=verbose)
    try:
        failed = talk.batch(messages or []) if batch else talk.interactive()
    finally:
        engine.close()
    if as_json:
        print(json.dumps([[reply.to_json() for reply in chat.replies] for chat in talk.chats], indent=1))
    raise typer.Exit(1 if failed else 0)


class _ChatLoop:
    """`chats`: the one that is shown, and with `--compare` its twin without the cache."""

    def __init__(self, chats: list[ChatSession], console: Console, verbose: bool) -> None:
        self.chats = chats
        self._console = console
        self._verbose = verbose

    @classmethod
    def over(cls, engine: AI100Engine, console: Console, *, compare: bool, use_cache: bool, verbose: bool) -> _ChatLoop:
        from ai100.chat import ChatSession

        modes = (True, False) if compare else (use_cache,)
        return cls([ChatSession(engine, use_cache=mode) for mode in modes], console, verbose)

    def batch(self, messages: list[str]) -> bool:
        """Whether one failed."""
        failed = False
        for message in messages:
            self._console.print(f"> {message}", style="bold", markup=False, highlight=False)
            failed |= not self._ask(message)
        self._show_end()
        return failed

    def interactive(self) -> bool:
        from ai100.chat import HELP, show_stats

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
        from ai100.chat import ask_and_show, show_comparison
        from kvarena.engines.base import EngineUnavailable

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
        from ai100.chat import totals

        if len(self.chats) == 2:
            totals(self.chats[0].replies, self.chats[1].replies, self._console)


def _check_mode(messages: list[str], *, batch: bool, as_json: bool, no_cache: bool, compare: bool) -> None:
    if batch != bool(messages):
        raise ValueError("--batch takes the messages to ask" if batch else "messages are given with --batch")
    if as_json and not batch:
        raise ValueError("--json goes with --batch")
    if no_cache and compare:
        raise ValueError("--compare asks with and without the cache; --no-cache goes without it")
