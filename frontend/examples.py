"""Questions that come with the chunk folder (`questions.jsonl`), each with the chunks it is about.

The file is optional, and so is every line of it: one that can't be used is left out. Lines with `"example": true` are
those that the page offers; where no line has it, all are. A line with `history` is offered after the questions in
it.
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
    """`kind` is `across` where a chunk leans on the one before. `after` are the questions asked before it."""

    question: str
    kind: str
    chunks: tuple[str, ...]
    after: tuple[str, ...] = ()


def load_examples(folder: Path, chunk_names: Collection[str]) -> list[Example]:
    """Examples that open a chat and whose chunks are all there: as in the file where it says which, else the two kinds
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
    """The context that the page opens on: the first example's, where the file chooses any; else none."""
    found, are_chosen = _read_all(folder, chunk_names)
    return next((example.chunks for example in found if not example.after), ()) if are_chosen else ()


def gold_answers(folder: Path, question: str, chunk_names: Collection[str]) -> str:
    """The first right answer that the folder has for a question; empty for others, and where a chunk is missing that it
    needs.
    """
    for line in _lines(folder):
        try:
            entry = json.loads(line)
            if entry["question"] == question and set(entry.get("needs") or entry["chunks"]) <= set(chunk_names):
                return str(entry["answers"][0])
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return ""


def follow_ups(folder: Path, chunk_names: Collection[str], asked: Sequence[str]) -> list[str]:
    """Questions that lean on those that were asked in this conversation."""
    found, _ = _read_all(folder, chunk_names)
    return list(dict.fromkeys(example.question for example in found if asked and example.after == tuple(asked)))


def _read_all(folder: Path, chunk_names: Collection[str]) -> tuple[list[Example], bool]:
    """All that can be used, and whether the file says which ones to offer."""
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
