"""Questions that come with the chunk folder (`questions.jsonl`), each with the chunks it is about.

The file is optional, and so is every line of it: one that can't be used is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from kvarena.bench.quality.questions import DEFAULT_KIND

QUESTIONS_NAME = "questions.jsonl"


@dataclass(frozen=True)
class Example:
    """`kind` is `across` where a chunk leans on the one before; a follow-up is no example, for it opens no chat."""

    question: str
    kind: str
    chunks: tuple[str, ...]


def load_examples(folder: Path, chunk_names: Collection[str]) -> list[Example]:
    """Examples whose chunks are all there; the two kinds alternate, `across` first."""
    path = folder / QUESTIONS_NAME
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = [example for line in lines if (example := _read(line, chunk_names))]
    across = [example for example in found if example.kind == "across"]
    others = [example for example in found if example.kind != "across"]
    pairs = zip_longest(across, others)
    return [example for pair in pairs for example in pair if example is not None]


def _read(line: bytes, chunk_names: Collection[str]) -> Example | None:
    try:
        entry = json.loads(line)
        example = Example(str(entry["question"]), str(entry.get("kind") or DEFAULT_KIND), tuple(entry["chunks"]))
        is_follow_up = bool(entry.get("history"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if is_follow_up:
        return None
    return example if set(example.chunks) <= set(chunk_names) and example.chunks else None
