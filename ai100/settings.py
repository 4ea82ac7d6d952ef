"""From settings to an engine: the same for the server, the command line and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ai100.engine import GEN_LEN, AI100Engine
from ai100.notes import CONTEXT_SHARE, NO_NOTES, NOTES_TOKENS, Embed, Notes, load_notes
from ai100.runtimes.card import CardUnavailable, CompileFailed, CompileOptions
from ai100.runtimes.registry import chosen, open_runtime
from ai100.runtimes.runtime import Runtime, StaticShapes
from ai100.topics import THRESHOLD, TOPICS_FILE, EmbeddingTopics, KeywordTopics, Topics, load_topics
from kvarena.documents import FALLBACK_SEPARATOR
from kvarena.home import StackError
from kvarena.model import DEFAULT_CARD_MODEL, Model, find_model
from kvarena.policies.profile import read_model_profile

KINDS_OF_TOPICS = ("keyword", "embedding")
START_ERRORS = (ValueError, OSError, StackError, CardUnavailable, CompileFailed)
"""What keeps an engine from being opened, and is told in a line."""


@dataclass(frozen=True)
class AI100Settings:
    """`model` `None` is `DEFAULT_CARD_MODEL` on the card and the stack's default elsewhere. `device`, `dtype` and
    `random_weights` are the host's. `sentence_model`: a folder or hub name whose files are here, for topics by
    embedding. `data` `None` is the folder that goes with the model, where there is one; `separator` `None` the model's.
    `sets_aside`: a slot is kept for turns without the cache.

    Raises `StackError` for a model that isn't there, `ValueError` for a bad profile of it.
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
    max_context: int | None = None
    gen_len: int = GEN_LEN
    use_cache: bool = True
    sets_aside: bool = True
    served_model_name: str | None = None
    data: Path | None = None
    notes_tokens: int = NOTES_TOKENS
    separator: str | None = None
    found: Model = field(init=False)

    def __post_init__(self) -> None:
        on_card = self.model is None and chosen(self.runtime) == "qaic"
        object.__setattr__(self, "found", find_model(DEFAULT_CARD_MODEL if on_card else self.model, "cpu"))

    @property
    def model_path(self) -> str:
        return self.found.name

    @property
    def notes_folder(self) -> Path | None:
        own = self.found.data_dir
        return self.data or (own if own.is_dir() else None)

    @property
    def notes_budget(self) -> int:
        """Notes leave most of a slot to what is said."""
        return min(self.notes_tokens, self.shapes.ctx_len // CONTEXT_SHARE)

    @property
    def notes_separator(self) -> str:
        profile = read_model_profile(self.model_path) if self.found.is_local else {}
        return self.separator or str(profile.get("separator") or FALLBACK_SEPARATOR)


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
        embed, knows_sentences = _embedding(settings, runtime)
        notes = _notes(settings, runtime, embed if knows_sentences else None)
        return AI100Engine(
            runtime,
            settings.served_model_name or settings.model_path,
            _topics(settings, lists, embed, notes if knows_sentences or embed is None else NO_NOTES),
            max_context=settings.max_context,
            gen_len=settings.gen_len,
            use_cache=settings.use_cache,
            notes=notes,
            sets_aside=settings.sets_aside,
        )
    except BaseException:
        runtime.close()
        raise


def _embedding(settings: AI100Settings, runtime: Runtime) -> tuple[Embed | None, bool]:
    """For topics by embedding. And whether it is a sentence model's: long texts say nothing to another."""
    if settings.topics == "keyword":
        return None, False
    from ai100.embeddings import local_embedding

    return local_embedding(settings.model_path, runtime.tokenizer, settings.sentence_model)


def _notes(settings: AI100Settings, runtime: Runtime, embed: Embed | None) -> Notes:
    folder = settings.notes_folder
    if folder is None:
        return Notes(separator=settings.notes_separator)
    return load_notes(folder, runtime.tokenizer, settings.notes_budget, settings.notes_separator, embed)


def _topics(settings: AI100Settings, lists: dict[str, tuple[str, ...]], embed: Embed | None, notes: Notes) -> Topics:
    if embed is None:
        return KeywordTopics(lists, settings.threshold, notes)
    return EmbeddingTopics(embed, lists, settings.threshold, notes)
