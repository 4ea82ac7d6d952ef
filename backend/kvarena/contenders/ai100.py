"""`ai100`: multi-turn chat on KV slots per topic, on a Cloud AI 100 card or on the host. Its server is `ai100/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from kvarena.contenders.servers import EngineServer, Launch, Options, own_options
from kvarena.contenders.spec import Container, ContenderSpec, setting

RuntimeName = Literal["auto", "qaic", "host", "onnx"]
TopicKind = Literal["keyword", "embedding"]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class AI100Settings:
    """`None` is the server's own default. `ctx_len` `None` is `MAX_MODEL_LEN`, where that is set.

    The chat in a terminal has the same options.
    """

    runtime: RuntimeName | None = setting(
        None,
        "qaic (the card), host (PyTorch), onnx (the card's graph in ONNX Runtime), or auto: the card where there is "
        "one, else host.",
        shown="auto",
    )
    full_batch_size: Count | None = setting(
        None, "Maximum number of turns that decode as one batch.", shown=2, short="-f"
    )
    kv_cache_batch_size: Count | None = setting(None, "Number of KV slots.", shown=4, short="-k")
    ctx_len: Count | None = setting(
        None,
        "Context length of a slot, in tokens.",
        shown=4096,
        short="-c",
        in_env="Default: MAX_MODEL_LEN where that is set, else 4096.",
    )
    prefill_seq_len: Count | None = setting(None, "Tokens per prefill step.", shown=128)
    gen_len: Count | None = setting(
        None, "Maximum tokens of an answer, where a request doesn't say.", shown=500, short="-g"
    )
    max_context: Count | None = setting(
        None,
        "A topic is reset when its earlier turns have more tokens than this.",
        shown=4096,
        short="-m",
        in_env="Default: what a slot holds.",
        default_text="default of the server: what a slot holds; of the chat: 800",
    )
    topics: TopicKind | None = setting(
        None, "How a message's topic is found: keyword (by the words of a file), or embedding.", shown="keyword"
    )
    topics_file: Path | None = setting(
        None, "Topics and their words.", shown="ai100/topics.yaml", default_text="default: the file that ships"
    )
    threshold: Annotated[float, Interval(ge=0, le=1)] | None = setting(
        None, "Minimum similarity of a message to a topic, from 0 to 1.", shown=0.3, short="-t"
    )
    notes_tokens: Annotated[int, Ge(0)] | None = setting(
        None, "Maximum tokens of notes from the data folder at the start of a topic; 0 for none.", shown=200
    )


def _options(launch: Launch) -> Options:
    """Every slot has the length of the context; notes are those of the page."""
    return {
        **own_options(launch),
        "--ctx-len": launch.settings.ctx_len or launch.max_model_len,
        "--max-model-len": None,
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
    on_card=lambda launch: launch.settings.runtime == "qaic",
    container=Container(
        profiles=("cpu", "gpu"),
        optional_in=("gpu",),
        mounts=("topics", "notes"),
        environment={"AI100_RUNTIME": "host", "AI100_TOPICS_FILE": "topics.yaml", "DATA_DIR": "data"},
    ),
)
