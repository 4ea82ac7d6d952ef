"""`python -m kvarena.engines.prefix`: loads a model and serves it as the `prefix` contender."""

from __future__ import annotations

from typing import Annotated

import typer

from kvarena.api.config import ApiConfig
from kvarena.api.serve import serve
from kvarena.engines.hf_model import HFModel
from kvarena.engines.prefix.engine import PrefixEngine
from kvarena.engines.prefix.http import router
from kvarena.engines.prefix.prefix_cache import MIN_TOKENS


def main(
    model: Annotated[str, typer.Option(help="A local folder or a hub name.")],
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call it. [default: the model's name]")
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8002,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest context in tokens. [default: the model's]")] = None,
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights.")] = "auto",
    cache_gb: Annotated[float, typer.Option(min=0, help="Memory for prefixes, in GiB.")] = 1.0,
    storage: Annotated[str, typer.Option(help="Where prefixes are kept: cpu, or device.")] = "cpu",
    min_tokens: Annotated[int, typer.Option(min=1, help="Shorter prefixes aren't reused.")] = MIN_TOKENS,
) -> None:
    loaded = HFModel.load(model, device=device, dtype=dtype, max_model_len=max_model_len, random=load_format == "dummy")
    engine = PrefixEngine(
        loaded,
        served_model_name or model,
        cache_bytes=int(cache_gb * 2**30),
        storage=storage,
        min_tokens=min_tokens,
    )
    serve(engine, host, port, ApiConfig.from_environment(), routers=[router])


if __name__ == "__main__":
    typer.run(main)
