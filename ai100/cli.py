"""`kvarena ai100 chat`: multi-turn chat on KV slots in a terminal, with the engine in this process. Its options but for
those of the chat itself are the server's too.

Heavy imports are inside the functions: `kvarena` imports this at its start.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvarena.contenders.ai100 import SPEC
from kvarena.contenders.command_line import with_options
from kvarena.contenders.command_line import with_settings as with_spec_settings

SettingsMaker = Callable[..., Any]
"""Makes `EngineSettings` of the options that were given, and of more fields by keyword."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `_make_settings` in place of its parameter `make_settings`."""
    options = [one for one in inspect.signature(_make_settings).parameters.values() if one.name != "more"]
    return with_options(command, "make_settings", options, lambda given: partial(_make_settings, **given))


@with_spec_settings(SPEC)
def _make_settings(
    settings: Any,
    model: Annotated[
        str | None,
        typer.Option(
            help="A local folder, a Hugging Face model name, or town. "
            "[default: meta-llama/Llama-3.2-1B-Instruct on the card, else the stack's]"
        ),
    ] = None,
    sentence_model: Annotated[
        str | None,
        typer.Option(help="For --topics embedding. [default: all-MiniLM-L6-v2 if installed, else word embeddings]"),
    ] = None,
    device: Annotated[str, typer.Option(help="Host runtime: auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Host runtime: auto, float32, bfloat16 or float16.")] = "float32",
    num_cores: Annotated[int, typer.Option(help="Card: cores to compile for.")] = 16,
    num_devices: Annotated[int, typer.Option(help="Card: devices to spread the model over.")] = 1,
    mxfp6_matmul: Annotated[bool, typer.Option("--mxfp6-matmul", help="Card: weights in MXFP6.")] = False,
    mxint8_kv_cache: Annotated[bool, typer.Option("--mxint8-kv-cache", help="Card: KV in MXINT8.")] = False,
    comp_ctx_lengths: Annotated[
        list[int] | None,
        typer.Option(
            help="Card: context lengths to compile besides --ctx-len (repeatable). Attention uses the shortest that is "
            "long enough. [default: always all of --ctx-len]"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of notes; each topic gets those that fit it. [default: the model's]")
    ] = None,
    **more: Any,
) -> Any:
    from ai100.runtimes.card import CompileOptions
    from ai100.settings import EngineSettings

    lengths = tuple(comp_ctx_lengths or ())
    compiled = CompileOptions(num_cores, num_devices, mxfp6_matmul, mxint8_kv_cache, lengths)
    return EngineSettings(settings, model, sentence_model, device, dtype, compiled, data, **more)


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

    from ai100.chat import ChatLoop, ChatSession
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
    modes = (True, False) if compare else (not no_cache,)
    talk = ChatLoop([ChatSession(engine, use_cache=mode) for mode in modes], console, verbose)
    try:
        failed = talk.batch(messages or []) if batch else talk.interactive()
    finally:
        engine.close()
    if as_json:
        print(json.dumps([[reply.to_json() for reply in chat.replies] for chat in talk.chats], indent=1))
    raise typer.Exit(1 if failed else 0)


def _check_mode(messages: list[str], *, batch: bool, as_json: bool, no_cache: bool, compare: bool) -> None:
    if batch != bool(messages):
        raise ValueError("--batch takes the messages to ask" if batch else "messages are given with --batch")
    if as_json and not batch:
        raise ValueError("--json goes with --batch")
    if no_cache and compare:
        raise ValueError("--compare asks with and without the cache; --no-cache goes without it")
