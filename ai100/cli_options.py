"""The options that the server and the chat have in common. Imported at the command line's start: typer only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        help="A folder, a hub name or town. [default: meta-llama/Llama-3.2-1B-Instruct on the card, else the stack's]"
    ),
]
RuntimeName = Annotated[str, typer.Option("--runtime", help="auto, qaic (the card), host, or onnx.")]
FullBatchSize = Annotated[int, typer.Option(help="How many turns decode together.")]
KvCacheBatchSize = Annotated[int, typer.Option(help="How many slots there are.")]
CtxLen = Annotated[int, typer.Option(help="Tokens of a slot.")]
PrefillSeqLen = Annotated[int, typer.Option(help="Tokens of a piece of prefill.")]
GenLen = Annotated[int, typer.Option(help="Longest answer, where a request doesn't say.")]
MaxContext = Annotated[int, typer.Option(help="A topic whose earlier turns have more tokens is reset.")]
TopicKind = Annotated[str, typer.Option("--topics", help="keyword or embedding.")]
TopicsFile = Annotated[Path | None, typer.Option(help="Topics and their words. [default: the one that ships]")]
SentenceModel = Annotated[
    str | None,
    typer.Option(help="For --topics embedding. [default: all-MiniLM-L6-v2 if it is here, else word embeddings]"),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder of notes; every topic gets those that fit it. [default: the model's]"),
]
NotesTokens = Annotated[int, typer.Option(help="The most tokens of notes that a topic begins with; 0 for none.")]
Separator = Annotated[str | None, typer.Option(help="What stands between notes. [default: the model's own]")]
Threshold = Annotated[float, typer.Option(help="How near a message must be to a topic, 0 to 1.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Process the whole history with every turn.")]
Device = Annotated[str, typer.Option(help="Of the host runtime: auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Of the host runtime: auto, float32, bfloat16 or float16.")]
NumCores = Annotated[int, typer.Option(help="Of the card: cores to compile for.")]
NumDevices = Annotated[int, typer.Option(help="Of the card: devices to spread the model over.")]
Mxfp6 = Annotated[bool, typer.Option("--mxfp6-matmul", help="On the card: weights in MXFP6.")]
Mxint8 = Annotated[bool, typer.Option("--mxint8-kv-cache", help="On the card: KV in MXINT8.")]
