"""`python -m kvarena.contenders.prefix`: loads a model and serves it as the `prefix` contender."""

from __future__ import annotations

from typing import Annotated

import typer

from kvarena.contenders import command_line
from kvarena.contenders.prefix.cache import MIN_TOKENS
from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.contenders.prefix.http import router
from kvarena.engines.hf.model import PREFILL_PIECE_TOKENS, HFModel
from kvarena.engines.store_metrics import StoreCollector
from kvarena.server.app import serve
from kvarena.server.state import ApiConfig


def main(
    model: command_line.Model,
    served_model_name: command_line.ServedModelName = None,
    host: command_line.Host = "127.0.0.1",
    port: command_line.Port = 8002,
    device: command_line.Device = "auto",
    dtype: command_line.Dtype = "auto",
    max_model_len: command_line.MaxModelLen = None,
    load_format: command_line.LoadFormat = "auto",
    cache_gb: Annotated[float, typer.Option(min=0, help="Memory for prefixes, in GiB.")] = 1.0,
    storage: Annotated[str, typer.Option(help="Where prefixes are kept: cpu, or device.")] = "cpu",
    min_tokens: Annotated[int, typer.Option(min=1, help="Shorter prefixes aren't reused.")] = MIN_TOKENS,
    piece_tokens: Annotated[
        int, typer.Option(min=1, help="Of a prefill that run at once; other requests' tokens go in between.")
    ] = PREFILL_PIECE_TOKENS,
) -> None:
    loaded = HFModel.load(model, device, dtype, max_model_len, random=load_format == "dummy", piece_tokens=piece_tokens)
    engine = PrefixEngine(
        loaded,
        served_model_name or model,
        cache_bytes=int(cache_gb * 2**30),
        storage=storage,
        min_tokens=min_tokens,
    )
    serve(engine, host, port, ApiConfig.from_environment(), routers=[router], collectors=[StoreCollector(engine)])


if __name__ == "__main__":
    command_line.run(main)
