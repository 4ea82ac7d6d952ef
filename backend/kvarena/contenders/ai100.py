"""`ai100`: multi-turn chat on KV slots per topic, on a Cloud AI 100 card or on the host. Its server is `ai100/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from kvarena.contenders.servers import EngineServer, Launch, Options, own_options
from kvarena.contenders.spec import Container, ContenderSpec, setting

Runtime = Literal["auto", "qaic", "host", "onnx"]
TopicKind = Literal["keyword", "embedding"]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class AI100Settings:
    """`None` is the server's own default. `ctx_len` `None` is `MAX_MODEL_LEN`, where that is set."""

    runtime: Runtime | None = setting(
        None,
        "qaic (the card), host (PyTorch), onnx (the card's graph in ONNX Runtime), or auto: the card where there is "
        "one, else host.",
        shown="auto",
    )
    full_batch_size: Count | None = setting(None, "How many turns decode together.", shown=2)
    kv_cache_batch_size: Count | None = setting(None, "How many slots there are.", shown=4)
    ctx_len: Count | None = setting(
        None, "Tokens of a slot. Default: MAX_MODEL_LEN where that is set, else 4096.", shown=4096
    )
    prefill_seq_len: Count | None = setting(None, "Tokens of a piece of prefill.", shown=128)
    gen_len: Count | None = setting(None, "Longest answer where a request doesn't say.", shown=500)
    max_context: Count | None = setting(None, "A topic whose earlier turns have more tokens is reset.", shown=800)
    topics: TopicKind | None = setting(
        None, "How a message's topic is found: keyword (by the words of a file), or embedding.", shown="keyword"
    )
    topics_file: Path | None = setting(None, "Topics and their words.", shown="ai100/topics.yaml")
    threshold: Annotated[float, Interval(ge=0, le=1)] | None = setting(
        None, "How near a message must be to a topic, from 0 to 1.", shown=0.3
    )
    notes_tokens: Annotated[int, Ge(0)] | None = setting(
        None, "The most tokens of notes of the data folder that a topic begins with; 0 for none.", shown=200
    )


def _options(launch: Launch) -> Options:
    """Every slot has the length of the context; notes are those of the page."""
    return {
        **own_options(launch),
        "--ctx-len": launch.settings.ctx_len or launch.max_model_len,
        "--data": launch.data_dir,
        "--separator": launch.blend.separator,
    }


SPEC = ContenderSpec(
    name="ai100",
    title="KV slots per topic",
    explanation="Keeps a KV slot for each topic of a conversation, and prefills only what is new.",
    port=8004,
    server=EngineServer("ai100.server", _options),
    report="slots",
    settings=AI100Settings,
    packages=lambda launch: {"onnxruntime" if launch.settings.runtime == "onnx" else "yaml": "ai100"},
    container=Container(
        profiles=("cpu", "ai100"),
        mounts=("topics", "notes"),
        environment={"AI100_RUNTIME": "host", "AI100_TOPICS_FILE": "topics.yaml", "DATA_DIR": "data"},
    ),
)
