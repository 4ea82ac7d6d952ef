"""Documents that were dropped on the page: which of them come back with its chat."""

from __future__ import annotations

from kvarena.documents import Document
from uploads import MAX_KEPT_BYTES, Upload, document_key, kept_documents


def test_documents_come_back_up_to_a_size_and_without_those_that_could_not_be_read() -> None:
    half = "ä" * (MAX_KEPT_BYTES // 4)
    documents = [
        Document("a.txt", (half, "and more")),
        Document("broken.pdf", problem="a broken PDF"),
        Document("b.txt", (half,)),
        Document("c.txt", ("short",)),
    ]
    assert [kept.path for kept in kept_documents(map(Upload, documents))] == ["a.txt", "c.txt"]


def test_the_key_of_a_document_is_its_names_and_its_texts() -> None:
    documents = [Document("a.txt", ("one", "two")), Document("a.txt", ("onetwo",)), Document("b.txt", ("one", "two"))]
    assert len({document_key(document) for document in documents}) == 3
    assert document_key(documents[0]) == document_key(Document("a.txt", ("one", "two"), note="another note"))
