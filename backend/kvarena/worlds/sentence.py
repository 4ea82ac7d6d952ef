"""A sentence of a chunk with what it says, references unresolved: a reader has to find out whom "the same" means."""

from __future__ import annotations

from dataclasses import dataclass

from kvarena.worlds.relations import Category


@dataclass(frozen=True)
class Reference:
    """A name, or "the same" of a category where `name` is empty. The name of a nickname stands for a person."""

    category: Category
    name: str = ""


@dataclass(frozen=True)
class Claim:
    """`bought` is what a question about the day of a purchase has to mention."""

    relation: str
    subject: Reference
    value: str | Reference
    bought: str = ""


@dataclass(frozen=True)
class Sentence:
    """`names` are the things that "the same ..." means from here on, by category, in the order of the text."""

    text: str
    claims: tuple[Claim, ...] = ()
    names: tuple[Reference, ...] = ()


Chunk = tuple[Sentence, ...]


def chunk_text(chunk: Chunk) -> str:
    return " ".join(sentence.text for sentence in chunk)
