"""`python -m kvarena.contenders.simllm`: loads a Llama model and serves it as the `simllm` contender."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from kvarena.contenders import command_line
from kvarena.contenders.servers import GIB
from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.http import router
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.contenders.simllm.params import AlignedParams, SimLLMParams
from kvarena.contenders.simllm.spec import SPEC
from kvarena.engines.store_metrics import StoreCollector
from kvarena.policies.params import PARAMETERS, profiled_params
from kvarena.policies.registry import Parameter, Value
from kvarena.server.app import create_app, serve
from kvarena.server.state import ApiConfig


def with_policy_options(command: command_line.Command) -> command_line.Command:
    """The command with an option for the policy and for each parameter of one. It gets those that are given."""

    def option(own: Parameter) -> inspect.Parameter:
        shown = typer.Option(None, help=f"{own.help_with_values} Default: that of the model's profile.")
        return inspect.Parameter(own.name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=own.type | None)

    def given(options: dict[str, Any]) -> dict[str, Value]:
        return {name: value for name, value in options.items() if value is not None}

    return command_line.with_options(command, "blend", [option(own) for own in PARAMETERS.values()], given)


@with_policy_options
@command_line.with_settings(SPEC)
def main(
    settings: Any,
    blend: dict[str, Value],
    model: command_line.Model,
    served_model_name: command_line.ServedModelName = None,
    host: command_line.Host = "127.0.0.1",
    port: command_line.Port = SPEC.port,
    device: command_line.Device = "auto",
    dtype: command_line.Dtype = "auto",
    max_model_len: command_line.MaxModelLen = None,
    load_format: command_line.LoadFormat = "auto",
) -> None:
    params = SimLLMParams(
        settings.mode,
        settings.max_cache_size,
        settings.similarity_threshold,
        settings.num_hyperplanes,
        AlignedParams(blend=profiled_params(model, **blend)),
        max_cache_bytes=int(settings.cache_gb * GIB),
    )
    loaded = load_simllm(
        model, params, device=device, dtype=dtype, max_model_len=max_model_len, random=load_format == "dummy"
    )
    engine = SimLLMEngine(loaded, served_model_name or model)
    config = ApiConfig.from_environment()
    serve(create_app(engine, config, routers=[router], collectors=[StoreCollector(engine)]), host, port)


if __name__ == "__main__":
    command_line.run(main)
