"""From settings to an engine: the same for the server, the command line and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ai100.engine import GEN_LEN, MAX_CONTEXT, AI100Engine
from ai100.runtimes.compiled import CompileOptions
from ai100.runtimes.registry import chosen, open_runtime
from ai100.runtimes.runtime import Runtime, StaticShapes
from ai100.topics import THRESHOLD, TOPICS_FILE, EmbeddingTopics, KeywordTopics, Topics, load_topics

CARD_MODEL = "meta-llama/Llama-3.2-1B-Instruct"
TOWN_MODEL = Path(__file__).resolve().parents[1] / "backend" / "models" / "town"
TOWN_NOTES = TOWN_MODEL / "notes"
KINDS_OF_TOPICS = ("keyword", "embedding")


@dataclass(frozen=True)
class AI100Settings:
    """`model` `None` is `CARD_MODEL` on the card and the town model elsewhere. `device`, `dtype` and `random_weights`
    are the host's. `sentence_model`: a folder or hub name whose files are here, for topics by embedding.
    """

    model: str | None = None
    runtime: str = "auto"
    shapes: StaticShapes = field(default_factory=StaticShapes)
    compile_options: CompileOptions = field(default_factory=CompileOptions)
    device: str = "auto"
    dtype: str = "float32"
    random_weights: bool = False
    topics: str = "keyword"
    topics_file: Path = TOPICS_FILE
    sentence_model: str | None = None
    threshold: float = THRESHOLD
    max_context: int = MAX_CONTEXT
    gen_len: int = GEN_LEN
    use_cache: bool = True
    served_model_name: str | None = None
    model_path: str = field(init=False)

    def __post_init__(self) -> None:
        on_card = self.model is None and chosen(self.runtime) == "qaic"
        object.__setattr__(self, "model_path", self.model or (CARD_MODEL if on_card else str(TOWN_MODEL)))

    @property
    def is_town(self) -> bool:
        return Path(self.model_path).resolve() == TOWN_MODEL


def open_engine(settings: AI100Settings) -> AI100Engine:
    """Raises `ValueError` naming a bad value and the choices, and what `open_runtime` raises."""
    if settings.topics not in KINDS_OF_TOPICS:
        raise ValueError(f"no topics by {settings.topics!r}; choose one of {', '.join(KINDS_OF_TOPICS)}")
    lists = load_topics(settings.topics_file)
    runtime = open_runtime(
        settings.runtime,
        settings.model_path,
        settings.shapes,
        options=settings.compile_options,
        device=settings.device,
        dtype=settings.dtype,
        random=settings.random_weights,
    )
    try:
        return AI100Engine(
            runtime,
            settings.served_model_name or settings.model_path,
            _topics(settings, lists, runtime),
            max_context=settings.max_context,
            gen_len=settings.gen_len,
            use_cache=settings.use_cache,
        )
    except BaseException:
        runtime.close()
        raise


def _topics(settings: AI100Settings, lists: dict[str, tuple[str, ...]], runtime: Runtime) -> Topics:
    if settings.topics == "keyword":
        return KeywordTopics(lists, settings.threshold)
    from ai100.embeddings import local_embedding

    embed = local_embedding(settings.model_path, runtime.tokenizer, settings.sentence_model)
    return EmbeddingTopics(embed, lists, settings.threshold)
