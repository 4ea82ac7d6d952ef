"""From settings to a runtime and an engine: the same for the server, the command line and the benchmark."""

from __future__ import annotations

import logging
import tempfile
import weakref
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ai100.engine import AI100Engine
from ai100.notes import CONTEXT_SHARE, NO_NOTES, Embed, Notes, load_notes
from ai100.runtimes import card
from ai100.runtimes.card import CardUnavailable, CompileFailed, CompileOptions, QEfficientRuntime
from ai100.runtimes.host import HostRuntime
from ai100.runtimes.runtime import ModelFiles, Runtime, StaticShapes
from ai100.topics import TOPICS_FILE, EmbeddingTopics, KeywordTopics, load_topics
from kvarena.contenders.ai100 import SPEC, AI100Settings, RuntimeName
from kvarena.documents import FALLBACK_SEPARATOR
from kvarena.home import StackError
from kvarena.model import DEFAULT_CARD_MODEL, Model, find_model
from kvarena.policies.params import read_model_profile

RUNTIMES = get_args(RuntimeName)
DEFAULT_OPTIONS = CompileOptions()
START_ERRORS = (ValueError, OSError, StackError, CardUnavailable, CompileFailed)
"""What keeps an engine from being opened, and is told in a line."""
logger = logging.getLogger(__name__)


def open_runtime(
    name: str,
    path: str,
    shapes: StaticShapes,
    *,
    options: CompileOptions = DEFAULT_OPTIONS,
    device: str = "auto",
    dtype: str = "float32",
    random: bool = False,
) -> Runtime:
    """`auto` is the card where there is one (`card.missing`), else the host.

    `qaic` runs on the card, with `options`; `host` in PyTorch, with `device`, `dtype` and `random` of
    `HostRuntime.load`; `onnx` runs the card's code over the exported graph in ONNX Runtime.
    Raises `ValueError` for a name or setting that can't be, `CardUnavailable` with all that is missing,
    `CompileFailed`, and `OSError` when there is no such model.
    """
    if name not in RUNTIMES:
        raise ValueError(f"no runtime {name!r}; choose one of {', '.join(RUNTIMES)}")
    name = chosen(name)
    if name == "host":
        return HostRuntime.load(path, shapes, device, dtype, random)
    if random:
        raise ValueError(f"runtime {name!r} has no random weights; only 'host' has")
    return _open_qaic(path, shapes, options) if name == "qaic" else _open_onnx(path, shapes)


def chosen(name: str) -> str:
    """What `auto` is on this machine; every other name is itself. Logs why it isn't the card."""
    if name != "auto":
        return name
    lacking = card.missing()
    if lacking:
        logger.info("runtime host, for this machine lacks %s", "; ".join(lacking))
    return "host" if lacking else "qaic"


def _open_qaic(path: str, shapes: StaticShapes, options: CompileOptions) -> Runtime:
    if lacking := card.missing():
        raise CardUnavailable(f"runtime 'qaic' needs {'; '.join(lacking)}. Runtime 'host' needs none of it")
    files = ModelFiles.read(path)
    files.check(shapes)
    program, lengths = card.compile_model(path, shapes, options)
    devices = range(options.num_devices) if options.num_devices > 1 else None
    return QEfficientRuntime(partial(card.open_on_card, program, devices), files, shapes, context_lengths=lengths)


def _open_onnx(path: str, shapes: StaticShapes) -> Runtime:
    try:
        from ai100.runtimes.onnx_session import OnnxSession, export
    except ImportError as error:
        raise ValueError(f"runtime 'onnx' needs the packages of kvarena[ai100]: {error}") from error
    files = ModelFiles.read(path)
    files.check(shapes)
    folder = tempfile.TemporaryDirectory(prefix="kvarena-graph-")
    graph = export(path, Path(folder.name))
    runtime = QEfficientRuntime(partial(OnnxSession, graph, shapes), files, shapes, name="onnx")
    weakref.finalize(runtime, folder.cleanup)
    return runtime


@dataclass(frozen=True)
class EngineSettings:
    """The contender's own settings, and what else the server, the chat and the benchmark may choose.

    `model` `None` is `DEFAULT_CARD_MODEL` on the card and the stack's default elsewhere. `device`, `dtype` and
    `random_weights` are the host's. `sentence_model`: a folder or hub name whose files are here, for topics by
    embedding. `data` `None` is the folder that goes with the model, where there is one; `separator` `None` the model's.
    `sets_aside`: a slot is kept for turns without the cache.

    Raises `StackError` for a model that isn't there, `ValueError` for a bad profile of it.
    """

    own: AI100Settings = field(default_factory=AI100Settings)
    model: str | None = None
    sentence_model: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    compile_options: CompileOptions = field(default_factory=CompileOptions)
    data: Path | None = None
    random_weights: bool = False
    use_cache: bool = True
    sets_aside: bool = True
    served_model_name: str | None = None
    separator: str | None = None
    found: Model = field(init=False)

    def __post_init__(self) -> None:
        own = SPEC.filled(self.own)
        object.__setattr__(self, "own", own)
        on_card = self.model is None and chosen(own.runtime) == "qaic"
        object.__setattr__(self, "found", find_model(DEFAULT_CARD_MODEL if on_card else self.model, "cpu"))

    @property
    def shapes(self) -> StaticShapes:
        own: Any = self.own  # filled
        return StaticShapes(own.prefill_seq_len, own.ctx_len, own.full_batch_size, own.kv_cache_batch_size)


def open_engine(settings: EngineSettings) -> AI100Engine:
    """Raises `ValueError` naming a bad value and the choices, and what `open_runtime` raises."""
    own: Any = settings.own  # filled
    lists = load_topics(own.topics_file or TOPICS_FILE)
    runtime = open_runtime(
        own.runtime,
        settings.found.name,
        settings.shapes,
        options=settings.compile_options,
        device=settings.device,
        dtype=settings.dtype,
        random=settings.random_weights,
    )
    try:
        embed, knows_sentences = _embedding(settings, runtime)
        notes = _notes(settings, runtime, embed if knows_sentences else None)
        topic_notes = notes if knows_sentences or embed is None else NO_NOTES
        return AI100Engine(
            runtime,
            settings.served_model_name or settings.found.name,
            EmbeddingTopics(embed, lists, own.threshold, topic_notes)
            if embed
            else KeywordTopics(lists, own.threshold, topic_notes),
            max_context=own.max_context,
            gen_len=own.gen_len,
            use_cache=settings.use_cache,
            notes=notes,
            sets_aside=settings.sets_aside,
        )
    except BaseException:
        runtime.close()
        raise


def _embedding(settings: EngineSettings, runtime: Runtime) -> tuple[Embed | None, bool]:
    """For topics by embedding. And whether it is a sentence model's: long texts say nothing to another."""
    if settings.own.topics == "keyword":
        return None, False
    from ai100.embeddings import local_embedding

    return local_embedding(settings.found.name, runtime.tokenizer, settings.sentence_model)


def _notes(settings: EngineSettings, runtime: Runtime, embed: Embed | None) -> Notes:
    """They leave most of a slot to what is said."""
    found, own = settings.found, settings.own
    profile = read_model_profile(found.name) if found.is_local else {}
    separator = settings.separator or str(profile.get("separator") or FALLBACK_SEPARATOR)
    if settings.data is None and not found.data_dir.is_dir():
        return Notes(separator=separator)
    assert own.notes_tokens is not None, "the settings are filled"
    assert own.ctx_len is not None, "the settings are filled"
    budget = min(own.notes_tokens, own.ctx_len // CONTEXT_SHARE)
    return load_notes(settings.data or found.data_dir, runtime.tokenizer, budget, separator, embed)
