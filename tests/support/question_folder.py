"""A folder of three chunks with questions that a scripted engine can be told the answers to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_question_folder(folder: Path, records: list[dict[str, Any]]) -> Path:
    """Returns the path of the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("1-tea", "Tea grows on the hill."), ("2-rain", "Rain falls at seven."), ("10-road", "A road.")):
        (folder / f"{name}.txt").write_text(text)
    (folder / "sys_prompt.txt").write_text("Read.")
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
