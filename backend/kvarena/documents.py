"""The documents of a folder, or uploaded on the page, as text chunks; and the prompt that is built from chunks.

A document is a `.txt`, `.md` or `.pdf` file. One that fits is one chunk, named after its file; a longer one is split
into numbered chunks (`manual 01`). A file that can't be used never hides the others: a remark says why. Whatever a
document says is text: what a tokenizer would read as a special token (`</s>`), or a server as the separator, gets an
invisible character. That is done here, so that every contender gets the same prompt. No tokens, no HTTP.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import random
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from kvarena.splitting import Splitter

if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

DOCUMENT_SUFFIXES = (".txt", ".md", ".pdf")
SYSTEM_PROMPT_NAME = "sys_prompt.txt"
QUESTIONS_NAME = "questions.jsonl"
"""Questions on a folder's chunks; without a kind they are of the default one."""
DEFAULT_KIND = "question"
FALLBACK_SEPARATOR = "\n\n"
"""Between chunks if neither the server nor its model's profile names a separator."""
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
LIKELY_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "mac_roman"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
MIN_LANGUAGE_COHERENCE_PERCENT = 40.0
"""From here on, a guessed encoding makes the text a known language; short texts don't reach it."""
LATIN_ALPHABETS = {
    "cp1252": {
        "English": "àáâäçèéêëíîïñóôöûü",  # in names and loan words
        "French": "àâçèéêëîïñôöœùûü",
        "German": "àäèéöüß",
        "Spanish": "áçéíñóúü¿",
        "Portuguese": "àáâãçéêíóôõúü",
        "Italian": "àèéìíîòóù",
        "Catalan": "àçèéíïòóúü",
        "Dutch": "äçèéêëïóöü",
        "Danish": "äåæèéòôöøü",
    },
    "cp1250": {
        "Polish": "óąćęłńśźż",
        "Czech": "áéíóúýčďěňřšťůž",
        "Slovak": "áäéíóôúýčďĺľňŕšťž",
        "Slovene": "čšž",
        "Croatian": "ćčđšž",
        "Hungarian": "áéíóöúüőű",
        "Romanian": "âîăşţ",
    },
    "cp1254": {"Turkish": "âçîöüğış" + "İ".lower()},
}
"""Code pages that are mistaken for each other, likeliest first, and their languages' letters beyond ASCII."""
MAX_COHERENCE_LOSS, MAX_ADDED_CHAOS = 0.15, 0.05
"""How much worse than its guess charset-normalizer may rate the encoding that is taken instead."""


@dataclass(frozen=True)
class TextChunk:
    """A document, or a numbered part of one: its name, and its text without surrounding white space."""

    name: str
    text: str


@dataclass(frozen=True)
class Remark:
    """Something to say about one file."""

    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Document:
    """A file that was read. `path` is its path within the folder, with only printable characters. If it can't be used
    it has no `parts`, and `problem` says why; `note` is what one should know of a usable one.
    """

    path: str
    parts: tuple[str, ...] = ()
    problem: str = ""
    note: str = ""


@dataclass(frozen=True)
class Documents:
    """A folder's chunks, its system prompt (empty without one), the files that can't be used, and notes on others.
    `is_split`: some document is more than one chunk.
    """

    chunks: tuple[TextChunk, ...] = ()
    system: str = ""
    problems: tuple[Remark, ...] = ()
    notes: tuple[Remark, ...] = ()
    is_split: bool = False


DocumentCache = dict[Path, tuple[object, Document]]
"""Documents read before, by file, with the file's state and the splitter."""


def load_documents(folder: Path, splitter: Splitter | None = None, cache: DocumentCache | None = None) -> Documents:
    """Everything below `folder` in natural order (2 before 10), without hidden files and folders.

    Files with the size and time that `cache` has aren't read again. Raises `ValueError` if there is no such folder, and
    for nothing that is in it.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of chunk files at {folder}")
    splitter = splitter or Splitter()
    earlier, seen = cache if cache is not None else {}, DocumentCache()
    system = _system_prompt(folder)
    found = [system]
    documents = []
    for path, reason in _files(folder):
        name = printable(path.relative_to(folder).as_posix())
        if name == system.path:
            continue
        if reason:
            found.append(Document(name, problem=reason))
        elif path.name.lower() == SYSTEM_PROMPT_NAME:
            found.append(Document(name, problem="not used; the system prompt is that of the folder itself"))
        else:
            documents.append(_read_once(path, name, splitter, earlier, seen))
    if cache is not None:
        cache.clear()
        cache.update(seen)
    chunks = [chunk for named in name_chunks(documents) for chunk in named]
    found = sorted([*found, *documents], key=lambda document: _natural_order(document.path))
    return Documents(
        tuple(chunks),
        "".join(system.parts),
        tuple(Remark(document.path, document.problem) for document in found if document.problem),
        tuple(Remark(document.path, document.note) for document in found if document.note),
        any(len(document.parts) > 1 for document in documents),
    )


def load_chunks(folder: Path, splitter: Splitter | None = None) -> list[TextChunk]:
    """Only the chunks. Raises as `load_documents` does."""
    return list(load_documents(folder, splitter).chunks)


def load_system_prompt(folder: Path) -> str:
    """Empty if the folder has none that can be read."""
    return "".join(_system_prompt(folder).parts)


def read_text(path: Path) -> str:
    """A file's text without byte order mark. Raises `ValueError` if it can't be read or isn't UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as UTF-8 text: {error}") from error
    return _clean(text)


def read_document(path: str, data: bytes, splitter: Splitter) -> Document:
    """From the bytes of a file, whose suffix says its kind."""
    path = printable(path)
    suffix = PurePosixPath(path).suffix.lower()
    try:
        text, note = _pdf_text(data) if suffix == ".pdf" else _decoded(data)
        if not any(character.isalnum() for character in text):
            raise ValueError(_without_words(suffix, text))
        text = without_special_tokens(text, splitter.special_tokens)
        return Document(path, tuple(splitter.split(text, is_markdown=suffix == ".md")), note=note)
    except ValueError as error:
        return Document(path, problem=str(error))


def name_chunks(documents: Sequence[Document], taken: Collection[str] = ()) -> list[tuple[TextChunk, ...]]:
    """The chunks of each document, all names different and none of `taken`.

    A chunk is named after its file without suffix, and its number if there are several; files that would share a name
    all keep their suffix. Names that are still the same (two uploads of one name) are counted: `a.txt (2)`.
    """
    with_suffix: set[int] = set()
    while True:
        bases = [_base(document, index in with_suffix) for index, document in enumerate(documents)]
        used = Counter(taken)
        for base, document in zip(bases, documents, strict=True):
            used.update(_claimed(base, document))
        clashing = {
            index
            for index, (base, document) in enumerate(zip(bases, documents, strict=True))
            if any(used[name] > 1 for name in _claimed(base, document))
        }
        if clashing <= with_suffix:
            break
        with_suffix |= clashing
    given = set(taken)
    named = []
    for base, document in zip(bases, documents, strict=True):
        own, number = base, 2
        while given & _claimed(own, document):
            own, number = f"{base} ({number})", number + 1
        given |= _claimed(own, document)
        names = _part_names(own, len(document.parts))
        named.append(tuple(TextChunk(name, text) for name, text in zip(names, document.parts, strict=True)))
    return named


def printable(name: str) -> str:
    """A file's name, fit to be shown and sent: line breaks, control characters and broken UTF-8 are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


def _base(document: Document, with_suffix: bool) -> str:
    return document.path if with_suffix else document.path[: -len(PurePosixPath(document.path).suffix) or None]


def _part_names(base: str, count: int) -> list[str]:
    if count == 1:
        return [base]
    return [f"{base} {number:0{max(2, len(str(count)))}}" for number in range(1, count + 1)]


def _claimed(base: str, document: Document) -> set[str]:
    """The names of its chunks, and the document's own."""
    return {base, *_part_names(base, len(document.parts))} if document.parts else set()


# -- files -------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[tuple[Path, str]]:
    """Every path below that could be a document, and why it can't be, if so; in natural order."""
    found: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        found.append((Path(error.filename), _os_reason(error)))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (here / name).is_symlink():
                found.append((here / name, "a link to a folder, which is not followed"))
            elif _is_document(name):
                found.append((here / name, "a folder, not a file; what is in it is read"))
        for name in files:
            if _is_document(name) and not name.startswith("."):
                found.append((here / name, _no_file(here / name)))
    return sorted(found, key=lambda entry: _natural_order(entry[0].as_posix()))


def _is_document(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in DOCUMENT_SUFFIXES


def _no_file(path: Path) -> str:
    """Why a path isn't a readable file; reading a pipe would never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to a file that isn't there"
    except OSError as error:
        return _os_reason(error)
    return "" if stat.S_ISREG(mode) else "not a regular file"


def _read_once(path: Path, name: str, splitter: Splitter, earlier: DocumentCache, seen: DocumentCache) -> Document:
    try:
        status = path.stat()
        state = (status.st_mtime_ns, status.st_size, status.st_ino, splitter)
        before = earlier.get(path)
        document = before[1] if before and before[0] == state else read_document(name, path.read_bytes(), splitter)
    except OSError as error:
        return Document(name, problem=_os_reason(error))
    seen[path] = (state, document)
    return document


def _os_reason(error: OSError) -> str:
    return f"can't be read: {error.strerror or error}"


def _system_prompt(folder: Path) -> Document:
    """The folder's own, in any case of its name; without a path if there is none."""
    try:
        names = [name for name in os.listdir(folder) if name.lower() == SYSTEM_PROMPT_NAME]
    except OSError:
        names = []
    files = [name for name in names if not (folder / name).is_dir()]
    if not files:
        return Document("")
    name = max(files)  # lower case first
    try:
        if reason := _no_file(folder / name):
            return Document(name, problem=reason)
        text, note = _decoded((folder / name).read_bytes())
    except OSError as error:
        return Document(name, problem=_os_reason(error))
    except ValueError as error:
        return Document(name, problem=str(error))
    return Document(name, (text,), note=note)


def _natural_order(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts], name


# -- texts -------------------------------------------------------------------------------------------------------------


def _without_words(suffix: str, text: str) -> str:
    if suffix == ".pdf":
        return "a PDF without text; scanned pages have to be recognised first"
    return "no words in it" if text else "empty"


def _decoded(data: bytes) -> tuple[str, str]:
    """A text file's text, and a note if its encoding was guessed. Raises `ValueError` with the reason."""
    encoding = BYTE_ORDER_MARKS.get(data[:2], "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise ValueError(f"not text: {error}") from error
        return _guessed(data, error)
    if "\0" in text:
        raise ValueError("not text: it has zero bytes")
    return _clean(text), "" if encoding == "utf-8-sig" else f"read as {encoding}"


def _guessed(data: bytes, error: UnicodeDecodeError) -> tuple[str, str]:
    """Only if the guess makes the text a known language: a wrong guess is worse than none."""
    from charset_normalizer import from_bytes

    if b"\0" in data:
        raise ValueError("not text: it has zero bytes") from error
    mended = data.decode("utf-8", "replace")
    num_bad = mended.count("\N{REPLACEMENT CHARACTER}")
    if sum(not character.isascii() for character in mended) > 2 * num_bad:
        raise ValueError(f"broken UTF-8 at byte {error.start}") from error
    matches = from_bytes(data, cp_isolation=list(LIKELY_ENCODINGS))
    guess = matches.best()
    if guess is None or guess.percent_coherence < MIN_LANGUAGE_COHERENCE_PERCENT:
        raise ValueError(
            f"not UTF-8 (byte {error.start}), and no other encoding is certain; save it as UTF-8"
        ) from error
    encoding = _latin_encoding(data, guess, matches) or guess.encoding
    return _clean(data.decode(encoding)), f"not UTF-8; read as {encoding}"


def _latin_encoding(data: bytes, guess: CharsetMatch, matches: Iterable[CharsetMatch]) -> str:
    """The code page in which a text has only one language's letters, and that fits about as well as the guess. Empty if
    there is none, or the guess isn't Latin, or already has the letters of its language.
    """
    if guess.encoding not in (*LATIN_ALPHABETS, "mac_roman"):
        return ""
    letters, alphabet = _letters(str(guess)), LATIN_ALPHABETS.get(guess.encoding, {}).get(guess.language, "")
    if letters and letters <= set(alphabet) and "cp1252" not in guess.could_be_from_charset:
        return ""
    fitting = {
        encoding: match
        for match in matches
        if guess.coherence - match.coherence <= MAX_COHERENCE_LOSS and match.chaos - guess.chaos <= MAX_ADDED_CHAOS
        for encoding in match.could_be_from_charset
    }
    for encoding, alphabets in LATIN_ALPHABETS.items():
        if encoding in fitting:
            letters = _letters(str(fitting[encoding]))
            if any(letters <= set(alphabet) for alphabet in alphabets.values()):
                return encoding
    return ""


def _letters(text: str) -> set[str]:
    """What words have beyond ASCII: letters, and what a wrong code page made of them. Quotation marks are the same in
    all these code pages.
    """
    found = re.findall(r"(?<=[^\W\d_])[^\x00-\x7f‘’“”–—…]|[^\x00-\x7f‘’“”„–—…](?=[^\W\d_])", text)
    return set("".join(found).lower())


def _pdf_text(data: bytes) -> tuple[str, str]:
    """The text of all pages; a line that continues in lower case is joined to the line before.

    Raises `ValueError` with the reason.
    """
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    if not data.strip():
        raise ValueError("empty")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every oddity that it repairs
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise _EncryptedError
        pages = [page.extract_text().strip() for page in reader.pages]
    except (_EncryptedError, DependencyError) as error:
        raise ValueError("an encrypted PDF; save it without a password") from error
    except Exception as error:  # a broken file can raise anything there
        raise ValueError(f"a broken PDF: {' '.join(str(error).split()) or type(error).__name__}") from error
    text = "\n\n".join(page for page in pages if page)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")
    text = re.sub(r"(?<=[^\W\d_])-\n+(?=[a-zß-ÿ])", "", text)
    return _clean(re.sub(r"(?<![.!?:;])[ ]*\n+(?=[a-zß-ÿ])", " ", text)), ""


class _EncryptedError(Exception):
    """A PDF that opens with a password only."""


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


WORD_JOINER = "\u2060"
"""Invisible, not white space, and without effect between any two characters."""


def without_special_tokens(text: str, special_tokens: Iterable[str]) -> str:
    """The text with special tokens turned into text."""
    return _broken_up(text, "|".join(re.escape(token) for token in special_tokens))


def without_separators(text: str, separator: str) -> str:
    """A chunk as it goes into a prompt: without a separator in it, or one that ends in the separator after it.

    A separator's own white space may be any.
    """
    before, after = (r"(?<!\S)" * separator[:1].isspace(), r"(?!\S)" * separator[-1:].isspace())
    core = re.escape(separator.strip())
    return _broken_up(text, core and before + core + after, separator)


def _broken_up(text: str, pattern: str, then: str = "") -> str:
    """With a word joiner after the first character of each match in the text with `then` after it."""
    found = re.finditer(f"(?={pattern})", text + then) if pattern else ()
    cuts = [0, *(match.start() + 1 for match in found if match.start() < len(text)), len(text)]
    return WORD_JOINER.join(text[start:end] for start, end in itertools.pairwise(cuts))


def join_chunks(texts: Sequence[str], separator: str) -> str:
    """The chunks with the separator before each and after the last, so that every chunk has two exact boundaries."""
    return "".join(separator + without_separators(text, separator) for text in texts) + separator if texts else ""


SCORED_CHARACTERS = 10_000
"""Roughly, of a context that is computed for its chunks' scores."""
SCORED_PROMPTS = 2
"""How many contexts score each chunk; more gain little (docs/quality.md)."""


def contexts_for_scores(
    chunks: Sequence[TextChunk], lacking: Collection[str], max_model_len: int | None
) -> list[list[TextChunk]]:
    """Contexts in random order, in `SCORED_PROMPTS` of which each chunk named in `lacking` stands between others. None
    if there are fewer than three chunks.
    """
    max_characters = min(SCORED_CHARACTERS, 2 * max_model_len) if max_model_len else SCORED_CHARACTERS
    contexts: list[list[TextChunk]] = []
    for number in range(SCORED_PROMPTS if len(chunks) > 2 else 0):
        rng = random.Random(number)
        waiting = [chunk for chunk in rng.sample(chunks, len(chunks)) if chunk.name in lacking]
        while waiting:
            size, middle = 0, [waiting.pop()]
            while waiting and len(middle) < len(chunks) - 2:
                size += len(middle[-1].text)
                if size + len(waiting[-1].text) > max_characters:
                    break
                middle.append(waiting.pop())
            before, after = rng.sample([chunk for chunk in chunks if chunk not in middle], 2)
            contexts.append([before, *middle, after])
    return contexts


SEAM_CHUNKS = 16


def contexts_for_seams(chunks: Sequence[TextChunk], max_model_len: int | None) -> list[list[TextChunk]]:
    """All chunks in order, in contexts that each begin with the last chunk of the one before."""
    max_characters = min(SCORED_CHARACTERS, 2 * max_model_len) if max_model_len else SCORED_CHARACTERS
    contexts: list[list[TextChunk]] = []
    for chunk in chunks:
        last = contexts[-1] if contexts else []
        is_full = len(last) >= SEAM_CHUNKS or sum(len(one.text) for one in (*last, chunk)) > max_characters
        if not last or (is_full and len(last) > 1):
            contexts.append([*last[-1:], chunk])
        else:
            last.append(chunk)
    return [context for context in contexts if len(context) > 1]


def build_messages(system: str, texts: Sequence[str], question: str, separator: str) -> list[dict[str, str]]:
    """The first turn of a chat over these chunks."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": join_chunks(texts, separator) + question}]
