"""A town on disk: a text file for each chunk, `sys_prompt.txt`, and `questions.jsonl`.

A line of the questions is an object with `question` and `answers`; `chunks` are the names of the chunk files it is
asked on, in that order, `needs` those it can't be answered without; `kind` and `detail` say what sort it is; `history`
holds the turns before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvarena.context import SYSTEM_PROMPT_NAME
from kvarena.worlds.chat import SYSTEM_PROMPT
from kvarena.worlds.exam import Item
from kvarena.worlds.sentence import Chunk, chunk_text

QUESTIONS_NAME = "questions.jsonl"


def chunk_names(town: Sequence[Chunk]) -> list[str]:
    """A number and what the chunk names first, such as `03-elmgate`."""
    width = max(2, len(str(len(town))))
    return [f"{number:0{width}}-{_first_name(chunk)}" for number, chunk in enumerate(town, 1)]


def write_folder(
    folder: Path, town: Sequence[Chunk], items: Sequence[Item], on_file: Callable[[], None] = lambda: None
) -> None:
    """Writes all files of a town into `folder`, which is made when it isn't there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = chunk_names(town)
    for name, chunk in zip(names, town, strict=True):
        (folder / f"{name}.txt").write_text(chunk_text(chunk) + "\n", encoding="utf-8")
        on_file()
    (folder / SYSTEM_PROMPT_NAME).write_text(SYSTEM_PROMPT + "\n", encoding="utf-8")
    lines = [json.dumps(_record(item, names), ensure_ascii=False) for item in items]
    (folder / QUESTIONS_NAME).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _record(item: Item, names: Sequence[str]) -> dict[str, Any]:
    question = item.question
    record: dict[str, Any] = {
        "question": question.question,
        "answers": [question.answer],
        "kind": question.kind,
        "detail": question.detail,
        "chunks": [names[place] for place in item.context],
        "needs": [names[place] for place in item.needs],
    }
    if question.history:
        record["history"] = [{"question": turn.question, "answer": turn.answer} for turn in question.history]
    return record


def _first_name(chunk: Chunk) -> str:
    named = [reference.name for sentence in chunk for reference in sentence.names if reference.name]
    return re.sub(r"[^a-z0-9]+", "-", named[0].lower()) if named else "notes"
