"""The options that the server and the chat have in common: the settings of the spec, and some beside them. Imported at
the command line's start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
