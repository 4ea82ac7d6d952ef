"""`python -m ai100.server`: the `ai100` contender. OpenAI's API, and `GET /slots`."""

from __future__ import annotations

from typing import Annotated

import typer
from fastapi import APIRouter
from pydantic import BaseModel

from ai100.cli_options import (
    CtxLen,
    Data,
    Device,
    Dtype,
    FullBatchSize,
    GenLen,
    KvCacheBatchSize,
    MaxContext,
    Model,
    Mxfp6,
    Mxint8,
    NoCache,
    NotesTokens,
    NumCores,
    NumDevices,
    PrefillSeqLen,
    RuntimeName,
    SentenceModel,
    Separator,
    Threshold,
    TopicKind,
    TopicsFile,
)
from ai100.engine import GEN_LEN, MAX_CONTEXT, AI100Engine
from ai100.notes import NOTES_TOKENS
from ai100.runtimes.card import CardUnavailable, CompileFailed, CompileOptions
from ai100.runtimes.runtime import StaticShapes
from ai100.settings import AI100Settings, open_engine
from ai100.topics import THRESHOLD, TOPICS_FILE
from kvarena.engines.store_metrics import StoreCollector
from kvarena.server.app import serve
from kvarena.server.state import ApiConfig, ServerDep
from kvarena.stack.service import StackError

router = APIRouter()


class SlotRow(BaseModel):
    """`position` tokens have their KV in the slot; the larger `last_used`, the later."""

    slot: int
    topic: str | None
    conversation: str | None
    position: int
    has_pending_token: bool
    in_use: bool
    last_used: int


class SlotRows(BaseModel):
    """`num_evictions`: slots that were taken from a topic for another."""

    slots: list[SlotRow]
    ctx_len: int
    num_evictions: int


@router.get("/slots")
async def slots(server: ServerDep) -> SlotRows:
    engine = server.engine
    assert isinstance(engine, AI100Engine)
    rows = [SlotRow(**row) for row in engine.slot_rows()]
    return SlotRows(slots=rows, ctx_len=engine.max_model_len, num_evictions=engine.batcher.slots.num_evictions)


def main(
    model: Model = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call it. [default: the model's name]")
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8004,
    runtime: RuntimeName = "auto",
    full_batch_size: FullBatchSize = 2,
    kv_cache_batch_size: KvCacheBatchSize = 4,
    ctx_len: CtxLen = 4096,
    prefill_seq_len: PrefillSeqLen = 128,
    gen_len: GenLen = GEN_LEN,
    max_context: MaxContext = MAX_CONTEXT,
    topics: TopicKind = "keyword",
    topics_file: TopicsFile = None,
    sentence_model: SentenceModel = None,
    threshold: Threshold = THRESHOLD,
    data: Data = None,
    notes_tokens: NotesTokens = NOTES_TOKENS,
    separator: Separator = None,
    no_cache: NoCache = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights.")] = "auto",
    num_cores: NumCores = 16,
    num_devices: NumDevices = 1,
    mxfp6_matmul: Mxfp6 = False,
    mxint8_kv_cache: Mxint8 = False,
) -> None:
    """Serve multi-turn chat on KV slots."""
    try:
        engine = open_engine(
            AI100Settings(
                model=model,
                runtime=runtime,
                shapes=StaticShapes(prefill_seq_len, ctx_len, full_batch_size, kv_cache_batch_size),
                compile_options=CompileOptions(num_cores, num_devices, mxfp6_matmul, mxint8_kv_cache),
                device=device,
                dtype=dtype,
                random_weights=load_format == "dummy",
                topics=topics,
                topics_file=topics_file or TOPICS_FILE,
                sentence_model=sentence_model,
                threshold=threshold,
                max_context=max_context,
                gen_len=gen_len,
                use_cache=not no_cache,
                served_model_name=served_model_name,
                data=data,
                notes_tokens=notes_tokens,
                separator=separator,
            )
        )
    except (ValueError, OSError, StackError, CardUnavailable, CompileFailed) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    serve(engine, host, port, ApiConfig.from_environment(), routers=[router], collectors=[StoreCollector(engine)])


if __name__ == "__main__":
    typer.run(main)
