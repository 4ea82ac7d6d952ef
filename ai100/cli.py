"""`kvarena ai100 chat`: multi-turn chat on KV slots in a terminal, with the engine in this process.

Heavy imports are inside the commands.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Annotated

import typer

from ai100.cli_options import (
    CtxLen,
    Data,
    Device,
    Dtype,
    FullBatchSize,
    GenLen,
    KvCacheBatchSize,
    MaxContext,
    Model,
    Mxfp6,
    Mxint8,
    NoCache,
    NotesTokens,
    NumCores,
    NumDevices,
    PrefillSeqLen,
    RuntimeName,
    SentenceModel,
    Threshold,
    TopicKind,
    TopicsFile,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ai100.chat import ChatSession
    from ai100.engine import AI100Engine


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Multi-turn chat on the KV slots of an AI 100.")


@app.callback()
def group() -> None:
    """Keeps `chat` a command of its own, though it is the only one."""


@app.command()
def chat(
    messages: Annotated[list[str] | None, typer.Argument(help="With --batch: what to ask, in order.")] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Ask the messages given, and end.")] = False,
    no_cache: NoCache = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask with and without the cache; times side by side.")
    ] = False,
    model: Model = None,
    runtime: RuntimeName = "auto",
    full_batch_size: FullBatchSize = 2,
    kv_cache_batch_size: KvCacheBatchSize = 4,
    ctx_len: CtxLen = 4096,
    prefill_seq_len: PrefillSeqLen = 128,
    gen_len: GenLen = 500,
    threshold: Threshold = 0.3,
    max_context: MaxContext = 800,
    topics: TopicKind = "keyword",
    topics_file: TopicsFile = None,
    sentence_model: SentenceModel = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    num_cores: NumCores = 16,
    num_devices: NumDevices = 1,
    mxfp6_matmul: Mxfp6 = False,
    mxint8_kv_cache: Mxint8 = False,
    data: Data = None,
    notes_tokens: NotesTokens = 200,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Topic, status and reason of every turn; the log.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --batch: print JSON on standard output.")] = False,
) -> None:
    """Chat; every topic keeps its KV slot, and a follow-up prefills only what is new."""
    from rich.console import Console

    from ai100.runtimes.card import CardUnavailable, CompileFailed, CompileOptions
    from ai100.runtimes.runtime import StaticShapes
    from ai100.settings import AI100Settings, open_engine
    from ai100.topics import TOPICS_FILE
    from kvarena.stack.service import StackError

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    console = Console(stderr=as_json)
    try:
        _check_mode(messages or [], batch=batch, as_json=as_json, no_cache=no_cache, compare=compare)
        settings = AI100Settings(
            model=model,
            runtime=runtime,
            shapes=StaticShapes(prefill_seq_len, ctx_len, full_batch_size, kv_cache_batch_size),
            compile_options=CompileOptions(num_cores, num_devices, mxfp6_matmul, mxint8_kv_cache),
            device=device,
            dtype=dtype,
            topics=topics,
            topics_file=topics_file or TOPICS_FILE,
            sentence_model=sentence_model,
            threshold=threshold,
            max_context=max_context,
            gen_len=gen_len,
            data=data,
            notes_tokens=notes_tokens,
        )
        engine = open_engine(settings)
    except (ValueError, OSError, StackError, CardUnavailable, CompileFailed) as error:
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
                case "stats":
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
