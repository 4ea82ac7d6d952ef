"""`python -m kvarena.contenders.simllm`: loads a Llama model and serves it as the `simllm` contender."""

from __future__ import annotations

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
from kvarena.engines.vllm.config import BlendConfig, read_blend_profile
from kvarena.server.app import serve
from kvarena.server.state import ApiConfig

SIMILARITY_THRESHOLD = 0.998
"""Prompts over the same long texts are nearly all above the paper's 0.8; docs/simllm.md has the figures."""


def _threshold(given: str | float) -> SimilarityThreshold:
    try:
        return AUTO if given == AUTO else checked_threshold(float(given))
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is neither auto nor a number from -1 to 1") from error


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
    policy: Annotated[
        str | None, typer.Option(help="Which reused tokens mode aligned recomputes. [default: the model's profile]")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of them, 0 to 1. [default: the model's profile]")] = None,
    check_layer: Annotated[
        int | None, typer.Option(help="The layer, from 0, whose keys are compared. [default: the model's profile]")
    ] = None,
    deviation: Annotated[
        str | None, typer.Option(help="What kv_deviation compares: keys or values. [default: the model's profile]")
    ] = None,
    num_filters: Annotated[
        int | None, typer.Option(help="Layers in which kv_deviation narrows down. [default: the model's profile]")
    ] = None,
    head_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each chunk for chunk_head. [default: the model's profile]")
    ] = None,
    run_tokens: Annotated[
        int | None, typer.Option(help="Neighbours that are chosen together. [default: the model's profile]")
    ] = None,
) -> None:
    chosen = {
        "policy": policy,
        "ratio": ratio,
        "check_layer": check_layer,
        "deviation": deviation,
        "num_filters": num_filters,
        "head_tokens": head_tokens,
        "run_tokens": run_tokens,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    params = SimLLMParams(
        mode,
        max_cache_size,
        similarity_threshold,
        num_hyperplanes,
        AlignedParams(blend=BlendConfig(**(read_blend_profile(model) | given)).params),
    )
    loaded = load_simllm(
        model, params, device=device, dtype=dtype, max_model_len=max_model_len, random=load_format == "dummy"
    )
    engine = SimLLMEngine(loaded, served_model_name or model)
    serve(engine, host, port, ApiConfig.from_environment(), routers=[router], collectors=[StoreCollector(engine)])


if __name__ == "__main__":
    command_line.run(main)
