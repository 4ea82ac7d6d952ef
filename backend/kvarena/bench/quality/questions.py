"""Questions with gold answers on text chunks, from a JSONL file and a folder of chunk files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvarena.documents import DEFAULT_KIND, Documents, Remark, TextChunk, load_documents, read_text
from kvarena.splitting import Splitter, find_splitter
from kvarena.synthetic_qa.questions import AnsweredQuestion, messages


@dataclass(frozen=True)
class EvalQuestion:
    """`answers` are all accepted ones. `history` are earlier turns of the same chat, answered by the gold answers.

    `needs` are names of the chunks that it can't be answered without, in the order in which they refer to each other,
    where that is known.
    """

    question: str
    answers: tuple[str, ...]
    chunks: tuple[TextChunk, ...]
    kind: str = DEFAULT_KIND
    detail: str = ""
    history: tuple[AnsweredQuestion, ...] = ()
    needs: tuple[str, ...] = ()

    def messages(self, system: str, separator: str) -> list[dict[str, str]]:
        turns = (*self.history, AnsweredQuestion(self.question, next(iter(self.answers), "")))
        return messages([chunk.text for chunk in self.chunks], turns, separator, system)

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answers": list(self.answers),
            "kind": self.kind,
            "detail": self.detail,
            "chunks": [chunk.name for chunk in self.chunks],
            "needs": list(self.needs),
        }


@dataclass(frozen=True)
class QuestionSet:
    """Questions on one folder of chunks, its system prompt, and its files that can't be used."""

    system: str
    questions: tuple[EvalQuestion, ...]
    problems: tuple[Remark, ...] = ()

    @property
    def chunks(self) -> list[TextChunk]:
        """All that the questions use, each once."""
        return list(dict.fromkeys(chunk for question in self.questions for chunk in question.chunks))

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(question.kind for question in self.questions))


@dataclass(frozen=True)
class Redraw:
    """Other contexts than the file's: the seed decides which chunks stand beside a question's `needs`, and where.

    `num_chunks` is the size of each context, that of the file's where it is None.
    """

    seed: int
    num_chunks: int | None = None

    @classmethod
    def of(cls, seed: int | None, num_chunks: int | None) -> Redraw | None:
        """None without a seed. Raises `ValueError` for a size without one."""
        if num_chunks and seed is None:
            raise ValueError("--num-chunks is the size of contexts that --seed draws")
        return None if seed is None else cls(seed, num_chunks)

    def context(self, question: str, needs: Sequence[str], size: int, names: Sequence[str]) -> list[str]:
        """So many names, with `needs` among them in their order; the same for the same seed and question."""
        rng = random.Random(f"{self.seed} {question}")
        others = [name for name in names if name not in needs]
        num_others = max(0, (self.num_chunks or size) - len(needs))
        context = rng.sample(others, min(num_others, len(others)))
        places = sorted(rng.sample(range(len(context) + len(needs)), len(needs)))
        for place, name in zip(places, needs, strict=True):
            context.insert(place, name)
        return context


def stack_splitter(chunk_tokens: int | None = None, tokenizer: str | None = None) -> Splitter:
    """Cuts documents as the stack that was started last does, so that its chunk cache knows them, but for what is
    given: a size, and a model's folder with the `tokenizer.json` that counts.
    """
    from kvarena.home import Home
    from kvarena.stack.record import read_record
    from kvarena.stack.settings import load_settings

    record = read_record(Home.find())
    stack = record.splitter if record else Splitter(load_settings().chunk_tokens)
    size = chunk_tokens or stack.chunk_tokens
    return find_splitter(tokenizer, size) if tokenizer else replace(stack, chunk_tokens=size)


def load_questions(
    path: Path,
    folder: Path | None = None,
    limit: int | None = None,
    redraw: Redraw | None = None,
    splitter: Splitter | None = None,
) -> QuestionSet:
    """The questions of a JSONL file over the chunks of a folder, by default the one that the file is in.

    A line is an object with `question` and `answers` (a list, or one text; an empty list: nothing is known to be right,
    so the answers are compared with full prefill's alone); `chunks` are names of chunks in the
    order of the context, all chunks of the folder where it's left out; `kind`, `detail`, `history` (a list of
    `question` and `answer`) and `needs` (some of the chunks) are optional. With `limit`, so many of them, always the
    same. `redraw` gives each another context, and wants `needs`. `splitter` cuts long documents, by default as the
    stack does. Raises `ValueError` that names the file and the line.
    """
    folder = folder or path.parent
    documents = load_documents(folder, splitter or stack_splitter())
    if not documents.chunks:
        reasons = "; ".join(map(str, documents.problems))
        raise ValueError(f"there are no .txt, .md or .pdf files in {folder} to ask about{reasons and f': {reasons}'}")
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line), documents, redraw))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise ValueError(f"{path} has no questions")
    if limit is not None and limit < len(questions):
        places = sorted(random.Random(0).sample(range(len(questions)), limit))
        questions = [questions[place] for place in places]
    return QuestionSet(documents.system, tuple(questions), documents.problems)


def _question(record: Any, documents: Documents, redraw: Redraw | None) -> EvalQuestion:
    chunks = {chunk.name: chunk for chunk in documents.chunks}
    if not isinstance(record, dict):
        raise ValueError(f"a question is a JSON object, not {record!r}")
    given = record.get("answers")
    answers = [] if given == [] else _texts([given] if isinstance(given, str) else given, "answers")
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text, not {question!r}")
    names = _texts(record["chunks"], "chunks") if record.get("chunks") is not None else list(chunks)
    if unknown := [name for name in names if name not in chunks]:
        raise ValueError(_no_such_chunk(unknown[0], documents))
    needs = list(dict.fromkeys(_texts(record["needs"], "needs"))) if record.get("needs") else []
    choices = list(chunks) if redraw else names
    if unknown := [name for name in needs if name not in choices]:
        raise ValueError(f"needs has {unknown[0]!r}, which is not among its chunks: {', '.join(choices)}")
    if redraw:
        if record.get("needs") is None:
            raise ValueError("without needs, the chunks that it can't be answered without, no other context is drawn")
        names = redraw.context(question, needs, len(names), choices)
    return EvalQuestion(
        question,
        tuple(answers),
        tuple(chunks[name] for name in names),
        str(record.get("kind") or DEFAULT_KIND),
        str(record.get("detail") or ""),
        _history(record.get("history") or []),
        tuple(needs),
    )


def _no_such_chunk(name: str, documents: Documents) -> str:
    """With the reason where its file can't be used, and the names where it is split or shares its name."""
    if reasons := [str(problem) for problem in documents.problems if problem.file.startswith(f"{name}.")]:
        return f"there is no chunk {name!r}: {reasons[0]}"
    names = [chunk.name for chunk in documents.chunks]
    alike = [other for other in names if other.startswith(name)] or names
    return f"there is no chunk {name!r}; the folder has {', '.join(alike[:20])}"


def _history(given: Any) -> tuple[AnsweredQuestion, ...]:
    try:
        return tuple(AnsweredQuestion(str(turn["question"]), str(turn["answer"])) for turn in given)
    except (TypeError, KeyError) as error:
        raise ValueError(f"history must be a list of objects with question and answer, not {given!r}") from error


def _texts(given: Any, name: str) -> Sequence[str]:
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} must be a list of texts, not {given!r}")
    return given
