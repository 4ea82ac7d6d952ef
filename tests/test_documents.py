"""The documents of a folder: what is read of a file, how its chunks are called, and how one bad file is shown."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ai100.notes import load_notes
from kvarena.core.matching import Segmenter
from kvarena.core.plan import as_token_ids
from kvarena.documents import (
    WORD_JOINER,
    Document,
    DocumentCache,
    Remark,
    TextChunk,
    build_messages,
    join_chunks,
    load_chunks,
    load_documents,
    load_system_prompt,
    name_chunks,
    read_document,
    without_separators,
)
from kvarena.policies.params import read_model_profile
from kvarena.splitting import Splitter, find_splitter
from support.pdf_files import encrypted, pdf_of
from support.tiny_models import tiny_tokenizer

GERMAN = "Die Straße führt über den Fluß nach Köln. Grüße an alle Bürger und Gäste, schöne Tage!"
SENTENCES = [f"Sentence number {number} is about the sea." for number in range(60)]
LONG = " ".join(SENTENCES)
SMALL = Splitter(64)


def names(folder: Path, splitter: Splitter | None = None) -> list[str]:
    return [chunk.name for chunk in load_chunks(folder, splitter)]


def problems(folder: Path) -> dict[str, str]:
    return {problem.file: problem.text for problem in load_documents(folder).problems}


def test_texts_are_read_without_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Über\r\nden Fluss\n".encode("utf-8-sig"))
    assert load_chunks(tmp_path) == [TextChunk("a", "Über\nden Fluss")]
    assert load_system_prompt(tmp_path) == ""


def test_a_bad_file_is_named_and_the_others_work(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("Good.")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "dashes.md").write_text("---\n")
    (tmp_path / "short.txt").write_bytes("Über den Fluss".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes((GERMAN + "ö").encode()[:-1])
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "sub.txt").mkdir()
    (tmp_path / "sub.txt" / "inner.txt").write_text("Inner.")
    (tmp_path / "linked").symlink_to(tmp_path / "sub.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing else")
    (tmp_path / "nothing.pdf").touch()
    (tmp_path / "scan.pdf").write_bytes(pdf_of([""]))
    (tmp_path / "locked.pdf").write_bytes(encrypted(pdf_of(["Secret."]), "password"))
    (tmp_path / "opened.pdf").write_bytes(encrypted(pdf_of(["Not secret."]), ""))
    found = problems(tmp_path)
    assert found.pop("broken.pdf").startswith("a broken PDF: ")
    assert found.pop("short.txt").startswith("not UTF-8 (byte 0)")
    assert found == {
        "empty.txt": "empty",
        "mark.txt": "empty",
        "dashes.md": "no words in it",
        "cut.txt": "broken UTF-8 at byte 96",
        "picture.txt": "not text: it has zero bytes",
        "gone.txt": "a link to a file that isn't there",
        "sub.txt": "a folder, not a file; what is in it is read",
        "linked": "a link to a folder, which is not followed",
        "pipe.txt": "not a regular file",
        "nothing.pdf": "empty",
        "scan.pdf": "a PDF without text; scanned pages have to be recognised first",
        "locked.pdf": "an encrypted PDF; save it without a password",
    }
    assert names(tmp_path) == ["good", "opened", "sub.txt/inner"]


def test_a_file_that_the_system_does_not_let_us_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text.")
    (tmp_path / "memory.txt").symlink_to("/proc/self/mem")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.md"))
        found = load_documents(tmp_path)
    assert found.problems == (
        Remark("memory.txt", "can't be read: Input/output error"),
        Remark("socket.md", "not a regular file"),
    )
    assert [chunk.name for chunk in found.chunks] == ["a"]


def test_another_encoding_is_read_where_it_is_certain(tmp_path: Path) -> None:
    (tmp_path / "western.txt").write_bytes(GERMAN.encode("cp1252"))
    (tmp_path / "wide.txt").write_bytes(GERMAN.encode("utf-16"))
    found = load_documents(tmp_path)
    assert [chunk.text for chunk in found.chunks] == [GERMAN, GERMAN]
    assert not found.problems
    assert [note.file for note in found.notes] == ["western.txt", "wide.txt"]
    assert found.notes[0].text == "not UTF-8; read as cp1252"


IN_CODE_PAGES = [
    ("cp1252", "Mireille Duchêne tient la boulangerie. Le pain de seigle coûte 3 € — « le meilleur », dit l’aîné."),
    (
        "cp1252",
        "Le soir, le vieux pêcheur rentra chez lui, à l’île, et raconta la tempête. C’était la fête, et l’on dîna.",
    ),
    (
        "cp1252",
        "Mireille Duchêne keeps the bakery in the high street — she opens at six, “even on Sundays”, says the clerk. "
        "A croissant costs €1.20 or £1, and the café next door buys forty of them each day.",
    ),
    ("cp1252", "Maria wohnt in München und fährt täglich mit dem Rad. Die Großmutter kocht sonntags „schön“ für 12 €."),
    ("cp1252", "¿Dónde está el niño? María vive en Madrid y su hermano lleva una pequeña librería detrás del jardín."),
    ("cp1252", "La sera il vecchio pescatore tornò a casa e raccontò della tempesta. Perché è così? Un dì si saprà."),
    ("cp1252", "A Maria mora em Lisboa. O irmão dela tem uma livraria na praça, e as condições são boas para a avó."),
    ("cp1250", "Wieczorem stary rybak wrócił do domu i opowiedział żonie o wielkiej burzy. Źródło leży w górach."),
    ("cp1250", "Večer se starý rybář vrátil domů a vyprávěl své ženě o veliké bouři. Pramen řeky leží v horách."),
    ("cp1250", "Este az öreg halász hazatért, és elmesélte a nagy vihart. A folyó forrása hűvös erdőben van."),
    ("cp1250", "Seara bătrânul pescar s-a întors acasă şi i-a povestit soţiei despre furtună. Izvorul e în munţi."),
    ("cp1250", "U nedjelju se svi sastaju kod bake na ručku. Livada iza kuće puna je cvijeća, a potok teče kroz šumu."),
    ("cp1254", "Akşam yaşlı balıkçı eve döndü ve karısına büyük fırtınayı anlattı. İstanbul'da ağabeyi kitapçı."),
    ("cp1251", "Вечером старый рыбак вернулся домой и рассказал жене о большой буре. Исток реки лежит высоко в горах."),
    ("koi8_r", "Мария живёт в Москве и каждый день ездит на работу на велосипеде. Её брат держит книжный магазин."),
    ("cp1253", "Το βράδυ ο γέρος ψαράς γύρισε στο σπίτι και διηγήθηκε στη γυναίκα του τη μεγάλη καταιγίδα."),
]


@pytest.mark.parametrize(("encoding", "text"), IN_CODE_PAGES)
def test_a_code_page_is_known_by_its_languages(encoding: str, text: str) -> None:
    document = read_document("notes.txt", text.encode(encoding), Splitter(4096))
    assert "".join(document.parts) == text
    assert document.note == f"not UTF-8; read as {encoding}"


def test_files_of_one_stem_keep_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "una.txt").write_text("One.")
    (tmp_path / "una.md").write_text("Two.")
    (tmp_path / "una.pdf").write_bytes(b"broken")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "una.txt").write_text("Three.")
    (tmp_path / "deep" / "una.md").write_text("")
    assert load_chunks(tmp_path) == [
        TextChunk("deep/una", "Three."),
        TextChunk("una.md", "Two."),
        TextChunk("una.txt", "One."),
    ]


def test_a_long_text_is_numbered_chunks_within_the_size(tmp_path: Path) -> None:
    (tmp_path / "manual.txt").write_text(LONG)
    (tmp_path / "short.txt").write_text(SENTENCES[0])
    found = load_documents(tmp_path, SMALL)
    chunks = [chunk for chunk in found.chunks if chunk.name != "short"]
    assert found.is_split
    assert len(chunks) > 9
    assert [chunk.name for chunk in chunks] == [f"manual {number:02}" for number in range(1, len(chunks) + 1)]
    assert " ".join(chunk.text for chunk in chunks) == LONG
    assert all(chunk.text.endswith(".") and SMALL.count(chunk.text) <= 64 for chunk in chunks)


def test_numbered_chunks_do_not_take_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "manual.txt").write_text(LONG)
    (tmp_path / "manual 02.txt").write_text("Another file.")
    found = names(tmp_path, SMALL)
    assert len(set(found)) == len(found)
    assert {"manual 02.txt", "manual.txt 02"} <= set(found)


def test_a_pdf_is_text_over_lines_and_pages(tmp_path: Path) -> None:
    (tmp_path / "guide.pdf").write_bytes(pdf_of([" ".join(SENTENCES[:30]), " ".join(SENTENCES[30:])]))
    (chunk,) = load_chunks(tmp_path, Splitter(4096))
    assert chunk.name == "guide"
    assert chunk.text.split() == LONG.split()
    assert len(load_chunks(tmp_path, SMALL)) > 9


def test_the_system_prompt_is_the_folders_own_whatever_its_case(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "sys_prompt.txt").write_text("Not this.")
    (tmp_path / "SYS_PROMPT.TXT").write_text("Be brief.")
    found = load_documents(tmp_path)
    assert (found.system, load_system_prompt(tmp_path)) == ("Be brief.", "Be brief.")
    assert found.chunks == ()
    assert [problem.file for problem in found.problems] == ["deep/sys_prompt.txt"]
    (tmp_path / "sys_prompt.txt").write_text("Be long.")
    found = load_documents(tmp_path)
    assert found.system == "Be long."
    assert [problem.file for problem in found.problems] == ["SYS_PROMPT.TXT", "deep/sys_prompt.txt"]


def test_a_system_prompt_that_cannot_be_read_is_a_problem_among_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text.")
    (tmp_path / "sys_prompt.txt").write_bytes("Über den Fluss".encode("latin-1"))
    found = load_documents(tmp_path)
    assert (found.system, load_system_prompt(tmp_path)) == ("", "")
    assert [problem.file for problem in found.problems] == ["sys_prompt.txt"]
    (tmp_path / "sys_prompt.txt").unlink()
    (tmp_path / "sys_prompt.txt").mkdir()
    assert problems(tmp_path) == {"sys_prompt.txt": "a folder, not a file; what is in it is read"}


def test_order_is_natural_whatever_digits_there_are(tmp_path: Path) -> None:
    for name in ("10²5", "a10", "a2", "10", "2", "a²", "a١"):
        (tmp_path / f"{name}.txt").write_text("Text.")
    assert names(tmp_path) == ["2", "10", "10²5", "a١", "a2", "a10", "a²"]


def test_hidden_files_and_other_kinds_are_left_out(tmp_path: Path) -> None:
    for name in (".hidden.txt", ".git/notes.txt", "deep/.b.md", "questions.jsonl", "a.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Text.")
    found = load_documents(tmp_path)
    assert (found.chunks, found.problems) == ((), ())


def test_a_cache_reads_again_what_has_changed(tmp_path: Path) -> None:
    cache: DocumentCache = {}
    path = tmp_path / "a.txt"
    path.write_text("One.")
    load_documents(tmp_path, SMALL, cache)
    (state, _) = cache[path]
    cache[path] = (state, Document("a.txt", ("Kept.",)))
    assert load_documents(tmp_path, SMALL, cache).chunks == (TextChunk("a", "Kept."),)
    assert load_documents(tmp_path, Splitter(65), cache).chunks == (TextChunk("a", "One."),)
    path.write_text("Another.")
    assert load_documents(tmp_path, Splitter(65), cache).chunks == (TextChunk("a", "Another."),)
    path.unlink()
    load_documents(tmp_path, Splitter(65), cache)
    assert cache == {}


file_names = st.binary(min_size=1, max_size=40).filter(lambda name: not set(b"/\0") & set(name) and name[:1] != b".")
stems = st.sampled_from(
    [b"a", b"a 01", b"a 1", b"a.txt", b"a.txt 01", b"a\n", b"a\\n", "é".encode(), b"\xff", b"\\xff"]
)


@settings(deadline=None, max_examples=60)
@given(st.sets(stems | file_names, max_size=8), st.data())
def test_whatever_files_are_called_every_name_is_another_and_can_be_sent(
    stems: set[bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        count = 0
        for stem, suffix in itertools.product(sorted(stems), (b".txt", b".md")):
            if data.draw(st.booleans()):
                text = data.draw(st.sampled_from(["One.", LONG]))
                Path(os.fsdecode(os.path.join(os.fsencode(folder), stem + suffix))).write_text(text)
                count += 1
        found = load_documents(Path(folder), SMALL)
        known = [chunk.name for chunk in found.chunks]
        assert len(set(known)) == len(known) >= count - len(found.problems)
        assert all(name.isprintable() and name.encode() for name in known)
        assert len(found.problems) <= 1, "one file may be called sys_prompt"


documents = st.builds(
    Document,
    st.sampled_from(["a.txt", "a.md", "a 01.txt", "a 02.pdf", "a.txt 01.txt", "b.txt", "b (2).txt"]),
    st.integers(0, 3).map(lambda count: ("text",) * count),
)


@given(st.lists(documents, max_size=8), st.sets(st.sampled_from(["a", "a.txt", "a 01", "a.txt (2)", "b"])))
def test_uploads_of_any_names_get_names_of_their_own(uploads: list[Document], taken: set[str]) -> None:
    named = name_chunks(uploads, taken)
    found = [chunk.name for chunks in named for chunk in chunks]
    assert [len(chunks) for chunks in named] == [len(upload.parts) for upload in uploads]
    assert len({*found, *taken}) == len(found) + len(taken)


def test_the_kind_of_an_upload_is_its_suffix() -> None:
    assert read_document("a.PDF", b"no pdf", SMALL).problem.startswith("a broken PDF")
    assert read_document("a\n.txt", b"Text.", SMALL) == Document("a\\n.txt", ("Text.",))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of chunk files at"):
        load_documents(tmp_path / "nowhere")


MODELS = Path(__file__).parents[1]
TOKENIZERS = [MODELS / "backend/models/town", MODELS / ".kvarena/models/SmolLM2-135M-Instruct"]
"""The second is there where the default model was set up."""


@pytest.mark.parametrize("model", TOKENIZERS, ids=lambda path: path.name)
def test_special_tokens_in_a_document_are_text(model: Path, tmp_path: Path) -> None:
    if not model.is_dir():
        pytest.skip("the default model isn't set up here")
    splitter = find_splitter(str(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert {"</s>", "<note>"} <= set(splitter.special_tokens) or "<|im_end|>" in splitter.special_tokens
    text = (
        "A start. " + " and ".join(splitter.special_tokens) + " end. " + "".join(splitter.special_tokens) + ". <s<s>>"
    )
    (tmp_path / "a.txt").write_text(text)
    (chunk,) = load_chunks(tmp_path, splitter)
    (note, *_) = load_notes(tmp_path, tokenizer, 4096, "\n\n").notes
    for found in (chunk.text, note.text):
        assert not set(tokenizer.encode(found, add_special_tokens=False)) & set(tokenizer.all_special_ids)
        assert found.replace(WORD_JOINER, "") == text
    separator = str(read_model_profile(str(MODELS / "backend/models" / model.name)).get("separator", "\n\n* * *\n\n"))
    messages = build_messages("", [chunk.text] * 2, "Who?", separator)
    plain = build_messages("", ["A start. And an end."] * 2, "Who?", separator)
    special = [num_special(tokenizer, chat) for chat in (messages, plain)]
    assert special[0] == special[1], "a document has ended a turn, or begun a chunk"


def num_special(tokenizer: Any, chat: list[dict[str, str]]) -> int:
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return sum(token in tokenizer.all_special_ids for token in ids)


@pytest.mark.parametrize("separator", [" # # ", "\n\n* * *\n\n", "<note>", " # ", "##"])
def test_separators_in_a_chunk_do_not_cut_it(separator: str) -> None:
    core = separator.strip()
    tokenizer = tiny_tokenizer()
    texts = [
        f"seven goats{separator}old cat",
        f"{core} Heading\n{core} green tea",
        f"under the hill {core[0]}",
        f"{core} {separator * 3}road",
        "## part # two",
    ]
    ids = as_token_ids(tokenizer.encode("Be brief." + join_chunks(texts, separator) + "who?"))
    segments = Segmenter(tokenizer, separator).segments(ids)
    found = [tokenizer.decode(ids[start:end]).replace(WORD_JOINER, "").strip() for start, end in segments]
    assert found == ["Be brief.", *(f"{separator}{text}".strip() for text in texts)]


@pytest.mark.parametrize("separator", ["", "\n\n", " # # ", "<note>"])
def test_a_chunk_without_separators_stays_as_it_is(separator: str) -> None:
    text = "# Title\n\n## Part # one\n\na## #b, C# #d <notes> #"
    assert without_separators(text + "x", separator) == text + "x"
