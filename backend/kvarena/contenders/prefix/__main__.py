"""`python -m kvarena.contenders.prefix`: loads a model and serves it as the `prefix` contender."""

from __future__ import annotations

from typing import Annotated

import typer

from kvarena.contenders import command_line
from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.contenders.prefix.http import router
from kvarena.contenders.prefix.spec import SPEC, PrefixSettings
from kvarena.contenders.servers import GIB
from kvarena.engines.hf.model import PREFILL_PIECE_TOKENS, HFModel
from kvarena.engines.store_metrics import StoreCollector
from kvarena.server.app import create_app, serve
from kvarena.server.state import ApiConfig


@command_line.with_settings(SPEC)
def main(
    settings: PrefixSettings,
    model: command_line.Model,
    served_model_name: command_line.ServedModelName = None,
    host: command_line.Host = "127.0.0.1",
    port: command_line.Port = SPEC.port,
    device: command_line.Device = "auto",
    dtype: command_line.Dtype = "auto",
    max_model_len: command_line.MaxModelLen = None,
    load_format: command_line.LoadFormat = "auto",
    piece_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per prefill step; other requests decode in between.")
    ] = PREFILL_PIECE_TOKENS,
) -> None:
    loaded = HFModel.load(model, device, dtype, max_model_len, random=load_format == "dummy", piece_tokens=piece_tokens)
    engine = PrefixEngine(
        loaded,
        served_model_name or model,
        cache_bytes=int(settings.cache_gb * GIB),
        storage=settings.storage,
        min_tokens=settings.min_tokens,
        max_entries=settings.max_entries,
        max_age_s=settings.max_age_s,
    )
    config = ApiConfig.from_environment()
    serve(create_app(engine, config, routers=[router], collectors=[StoreCollector(engine)]), host, port)


if __name__ == "__main__":
    command_line.run(main)
