"""What the commands of the PyTorch contenders have in common: which model, where, which address; and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Option(help="A local folder or a Hugging Face model name.")]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call it. [default: the model's name]")]
Host = Annotated[str, typer.Option()]
Port = Annotated[int, typer.Option()]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest context in tokens. [default: the model's]")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy for random weights.")]


def run(main: Callable[..., None]) -> None:
    """Runs a command. What keeps a server from starting, as a model that it can't serve, is said in one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
