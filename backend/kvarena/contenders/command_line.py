"""What the commands of our own servers have in common: which model, where, which address; their specs' settings as
options; and how they end.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from kvarena.contenders.servers import option_of
from kvarena.contenders.spec import ContenderSpec, Setting

Model = Annotated[str, typer.Option(help="A local folder or a Hugging Face model name.")]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call it. [default: the model's name]")]
Host = Annotated[str, typer.Option()]
Port = Annotated[int, typer.Option()]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the checkpoint's.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest context in tokens. [default: the model's]")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy for random weights.")]
Command = Callable[..., Any]


def with_settings(spec: ContenderSpec) -> Callable[[Command], Command]:
    """The command with an option for each setting of the spec. It gets them as its parameter `settings`, with the
    server's own default where nothing is given.
    """
    options = [_option(own) for own in spec.own_settings()]
    assert spec.settings is not None, f"{spec.name} has no settings"
    make = spec.settings
    return lambda command: with_options(command, "settings", options, lambda given: make(**given))


def with_options(
    command: Command, into: str, options: Sequence[inspect.Parameter], make: Callable[[dict[str, Any]], Any]
) -> Command:
    """The command with these options in place of its parameter `into`, which gets what `make` makes of them."""

    @wraps(command)
    def wrapped(**given: Any) -> Any:
        made = make({one.name: given.pop(one.name) for one in options})
        return command(**given, **{into: made})

    signature = inspect.signature(command, eval_str=True)
    kept = [
        one if one.kind is one.VAR_KEYWORD else one.replace(kind=one.KEYWORD_ONLY)
        for one in signature.parameters.values()
        if one.name != into
    ]
    parameters = sorted([*kept, *options], key=lambda one: one.kind)
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what Typer reads
    return wrapped


def _option(own: Setting) -> inspect.Parameter:
    def read(text: object) -> Any:
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(own.annotation).validate_python(text)
        except ValidationError as error:
            demand = f"must be {own.demand}, not {text!r}" if own.demand else error.errors()[0]["msg"]
            raise typer.BadParameter(demand) from error

    shown = typer.Option(
        None if own.default_text else own.shown,
        option_of(own.name),
        *filter(None, [own.short]),
        parser=read,
        metavar=f"<{'|'.join(_choices(own.annotation))}>",
        help=f"{own.text} {own.default_text and f'[{own.default_text}]'}".strip(),
    )
    return inspect.Parameter(own.name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=Any)


def _choices(annotation: Any) -> list[str]:
    """Words or types that a value may be of: `["float", "auto"]` of a number or the word auto."""
    members = get_args(annotation)
    if not members:
        return [] if annotation is type(None) else [annotation.__name__.lower()]
    if get_origin(annotation) is Literal:
        return list(map(str, members))
    of_values = members[:1] if hasattr(annotation, "__metadata__") else members
    return [choice for member in of_values for choice in _choices(member)]


def run(main: Callable[..., None]) -> None:
    """Runs a command. What keeps a server from starting, as a model that it can't serve, is said in one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    try:
        app()
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
