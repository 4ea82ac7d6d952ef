"""Documents that were dropped on the page: which of them come back with its chat, and how far their filling is."""

from __future__ import annotations

import re
from concurrent.futures import Future

from documents_view import (
    MAX_KEPT_BYTES,
    Filling,
    Upload,
    document_key,
    kept_documents,
    total_html,
    upload_html,
)
from kvarena.client import ChunkOutcome, Outcome
from kvarena.documents import Document


def test_documents_come_back_up_to_a_size_and_without_those_that_could_not_be_read() -> None:
    half = "ä" * (MAX_KEPT_BYTES // 4)
    documents = [
        Document("a.txt", (half, "and more")),
        Document("broken.pdf", problem="a broken PDF"),
        Document("b.txt", (half,)),
        Document("c.txt", ("short",)),
    ]
    assert [kept.path for kept in kept_documents(map(Upload, documents))] == ["a.txt", "c.txt"]


def test_a_document_says_whether_it_comes_back_after_a_reload() -> None:
    upload, problem = Upload(Document("a.txt", ("one",))), Upload(Document("broken.pdf", problem="a broken PDF"))
    lost = upload_html(upload, is_kept=False)
    assert '<small data-kept="false">Too large to come back after a reload: a chat keeps 4 MB of documents.' in lost
    assert "Save it into the data folder" in lost
    shown = upload_html(upload) + upload_html(upload, is_kept=True) + upload_html(problem, is_kept=False)
    assert "data-kept" not in shown


def test_the_key_of_a_document_is_its_names_and_its_texts() -> None:
    documents = [Document("a.txt", ("one", "two")), Document("a.txt", ("onetwo",)), Document("b.txt", ("one", "two"))]
    assert len({document_key(document) for document in documents}) == 3
    assert document_key(documents[0]) == document_key(Document("a.txt", ("one", "two"), note="another note"))


def filling_of(num_chunks: int, *outcomes: Outcome) -> Filling:
    return Filling(num_chunks, [ChunkOutcome("a", outcome, "why") for outcome in outcomes], Future())


def test_a_filling_counts_the_chunks_that_are_done_out_of_all() -> None:
    document = Document("a.txt", ("one", "two"), note="a note")
    shown = upload_html(Upload(document, filling_of(2, "warmed")))
    assert "<small>KV of 1 of 2 chunks filled; a note</small>" in shown
    assert '<progress value="1" max="2">' in shown
    assert "<small>KV of 0 of 1 chunk filled</small>" in upload_html(Upload(Document("a.txt", ("one",)), filling_of(1)))
    failing = upload_html(Upload(Document("a.txt", ("one", "two", "three")), filling_of(3, "warmed", "failed")))
    assert 'data-state="filling"' in failing
    assert "<small>KV of 1 of 3 chunks filled; the KV of 1 isn&#x27;t there. a: why</small>" in failing


def test_documents_that_are_filled_together_are_one_line() -> None:
    shown = total_html(
        [
            filling_of(20, "warmed", "warmed", "warmed", "warmed", "warmed", "warmed"),
            filling_of(2, "already_there"),
            filling_of(1),
        ]
    )
    assert re.search(r"KV of 7 of 23 chunks filled, 3 documents, \d+ s<", shown)
    assert '<progress value="7" max="23">' in shown
