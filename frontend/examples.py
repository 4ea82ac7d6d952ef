"""Questions that come with the chunk folder (`questions.jsonl`), each with the chunks it is about.

The file is optional, and unusable lines are left out. The page offers lines with `"example": true`, or all lines if
none has it. A line with `history` is offered after the questions in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from kvarena.documents import DEFAULT_KIND, QUESTIONS_NAME


@dataclass(frozen=True)
class Example:
    """`kind` is `across` if it takes several chunks to answer. `after` are the questions that were asked before it."""

    question: str
    kind: str
    chunks: tuple[str, ...]
    after: tuple[str, ...] = ()


def load_examples(folder: Path, chunk_names: Collection[str]) -> list[Example]:
    """Examples that open a chat and whose chunks all exist: in the file's order if it chooses them; else the two kinds
    alternate, `across` first.
    """
    found, are_chosen = _read_all(folder, chunk_names)
    opening = [example for example in found if not example.after]
    if are_chosen:
        return opening
    across = [example for example in opening if example.kind == "across"]
    others = [example for example in opening if example.kind != "across"]
    pairs = zip_longest(across, others)
    return [example for pair in pairs for example in pair if example is not None]


def opening_chunks(folder: Path, chunk_names: Collection[str]) -> tuple[str, ...]:
    """The context that a new page opens with: the first example's, if the file chooses examples."""
    found, are_chosen = _read_all(folder, chunk_names)
    return next((example.chunks for example in found if not example.after), ()) if are_chosen else ()


def gold_answer(folder: Path, question: str, chunk_names: Collection[str]) -> str:
    """The folder's first right answer to a question; empty if there is none, or a chunk that it needs is missing."""
    for line in _lines(folder):
        try:
            entry = json.loads(line)
            if entry["question"] == question and set(entry.get("needs") or entry["chunks"]) <= set(chunk_names):
                return str(entry["answers"][0])
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return ""


def follow_ups(folder: Path, chunk_names: Collection[str], asked: Sequence[str]) -> list[str]:
    """Questions that continue those asked in this conversation."""
    found, _ = _read_all(folder, chunk_names)
    return list(dict.fromkeys(example.question for example in found if asked and example.after == tuple(asked)))


def _read_all(folder: Path, chunk_names: Collection[str]) -> tuple[list[Example], bool]:
    """All usable examples, and whether the file says which ones to offer."""
    read = [found for line in _lines(folder) if (found := _read(line, chunk_names))]
    chosen = [example for example, is_chosen in read if is_chosen]
    return (chosen, True) if chosen else ([example for example, _ in read], False)


def _lines(folder: Path) -> list[bytes]:
    try:
        return (folder / QUESTIONS_NAME).read_bytes().splitlines()
    except OSError:  # it isn't there, or isn't ours to read
        return []


def _read(line: bytes, chunk_names: Collection[str]) -> tuple[Example, bool] | None:
    try:
        entry = json.loads(line)
        after = tuple(str(turn["question"]) for turn in entry.get("history") or ())
        kind = str(entry.get("kind") or DEFAULT_KIND)
        example = Example(str(entry["question"]), kind, tuple(entry["chunks"]), after)
        is_chosen = entry.get("example") is True
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (example, is_chosen) if set(example.chunks) <= set(chunk_names) and example.chunks else None
