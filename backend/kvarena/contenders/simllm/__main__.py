"""`python -m kvarena.contenders.simllm`: loads a Llama model and serves it as the `simllm` contender."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from kvarena.contenders import command_line
from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.http import router
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.contenders.simllm.params import (
    AUTO,
    AlignedParams,
    Mode,
    SimilarityThreshold,
    SimLLMParams,
    checked_threshold,
)
from kvarena.engines.store_metrics import StoreCollector
from kvarena.policies.params import PARAMETERS
from kvarena.policies.profile import profiled_params
from kvarena.policies.registry import Parameter, Value
from kvarena.server.app import serve
from kvarena.server.state import ApiConfig

SIMILARITY_THRESHOLD = 0.998
"""Prompts over the same long texts are nearly all above the paper's 0.8; docs/simllm.md has the figures."""


def _threshold(given: str | float) -> SimilarityThreshold:
    try:
        return AUTO if given == AUTO else checked_threshold(float(given))
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is neither auto nor a number from -1 to 1") from error


def with_policy_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for the policy and for each parameter of one. It gets those that are given."""

    @wraps(command)
    def wrapped(**options: Any) -> None:
        given = {name: value for name, value in options.items() if name not in PARAMETERS or value is not None}
        command(**given)

    def option(own: Parameter) -> inspect.Parameter:
        shown = typer.Option(None, help=f"{own.help_with_values} Default: that of the model's profile.")
        return inspect.Parameter(own.name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=own.type | None)

    signature = inspect.signature(command, eval_str=True)
    fixed = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [*fixed, *map(option, PARAMETERS.values())]
    wrapped.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]  # what Typer reads
    return wrapped


@with_policy_options
def main(
    model: command_line.Model,
    served_model_name: command_line.ServedModelName = None,
    host: command_line.Host = "127.0.0.1",
    port: command_line.Port = 8003,
    device: command_line.Device = "auto",
    dtype: command_line.Dtype = "auto",
    max_model_len: command_line.MaxModelLen = None,
    load_format: command_line.LoadFormat = "auto",
    mode: Annotated[Mode, typer.Option(help="What a similar task lends.")] = "aligned",
    similarity_threshold: Annotated[
        Any,  # Typer has no unions; _threshold says what it is
        typer.Option(
            parser=_threshold,
            metavar="auto|COSINE",
            help="The least cosine of two tasks that are similar; auto: the least that measured agreement allows.",
        ),
    ] = SIMILARITY_THRESHOLD,
    max_cache_size: Annotated[int, typer.Option(min=1, help="How many tasks are kept.")] = 100,
    num_hyperplanes: Annotated[int, typer.Option(min=1, max=64, help="Bits of a task's hash.")] = 16,
    **blend: Value,
) -> None:
    params = SimLLMParams(
        mode,
        max_cache_size,
        similarity_threshold,
        num_hyperplanes,
        AlignedParams(blend=profiled_params(model, **blend)),
    )
    loaded = load_simllm(
        model, params, device=device, dtype=dtype, max_model_len=max_model_len, random=load_format == "dummy"
    )
    engine = SimLLMEngine(loaded, served_model_name or model)
    serve(engine, host, port, ApiConfig.from_environment(), routers=[router], collectors=[StoreCollector(engine)])


if __name__ == "__main__":
    command_line.run(main)
