"""Which topic a message belongs to: by lists, by what was said, by what a follow-up refers to, by vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from ai100.embeddings import InputVectors, Remembered, SentenceVectors, local_embedding
from ai100.topics import TOPICS_FILE, EmbeddingTopics, KeywordTopics, Spoken, Topics, load_topics
from ai100.words import content_words, is_follow_up, stem

DEFAULT = KeywordTopics(load_topics())
CRICKET = ("sports", "Who is the best cricket player?")
PASTA = ("cooking", "How do I cook pasta?")


def walk(topics: Topics, *messages: str) -> list[str]:
    earlier: list[Spoken] = []
    for message in messages:
        earlier.append((topics.topic_of(message, earlier), message))
    return [name for name, _ in earlier]


@pytest.mark.parametrize(
    ("message", "topic"),
    [
        ("Who is the best cricket player?", "sports"),
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
    assert DEFAULT.topic_of("Tell me about Virat Kohli and his many friends", []) == "virat kohli friends"
    assert DEFAULT.topic_of("???", []) == "talk"
    assert DEFAULT.topic_of("Why?", []) == "why"


def test_a_follow_up_goes_to_the_topic_it_refers_to() -> None:
    assert DEFAULT.topic_of("What is his highest score?", [CRICKET, PASTA]) == "sports", "a score is no pasta's"
    assert (
        DEFAULT.topic_of("What is his highest score?", [("virat kohli", "Tell me about Virat Kohli")]) == "virat kohli"
    )


@pytest.mark.parametrize(
    "message", ["And why is that?", "Why?", "Tell me more", "Can you explain it again?", "What about her?"]
)
def test_an_ambiguous_follow_up_goes_to_the_most_recent_topic(message: str) -> None:
    assert DEFAULT.topic_of(message, [CRICKET, PASTA]) == "cooking"
    assert DEFAULT.topic_of(message, [PASTA, CRICKET]) == "sports"


def test_a_conversation_that_comes_and_goes() -> None:
    said = [
        "Tell me about Virat Kohli",
        "What is his highest score?",
        "How do I bake bread?",
        "How much salt does it need?",
        "Did Virat Kohli ever play in England?",
        "And the flour?",
    ]
    names = walk(DEFAULT, *said)
    assert names == ["virat kohli", "virat kohli", "cooking", "cooking", "virat kohli", "cooking"]


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


def vectors_by_letter(texts: list[str]) -> np.ndarray:
    table = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def test_topics_by_vectors_follow_the_same_rule() -> None:
    topics = EmbeddingTopics(vectors_by_letter, {"zoo": ["zebra", "zoo"], "lily": ["lily", "lilly"]}, threshold=0.6)
    assert topics.topic_of("zebras zoo", []) == "zoo"
    assert topics.topic_of("lily", [("zoo", "zebra")]) == "lily"
    assert topics.topic_of("What is it?", [("lily", "lily"), ("qqq", "qqq")]) == "qqq", "the most recent"
    assert topics.topic_of("Is that lily's?", [("lily", "lily"), ("qqq", "qqq")]) == "lily", "the nearest"
    assert topics.topic_of("hum", []) == "hum"


def test_the_served_models_input_embeddings(ai100_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    chosen = local_embedding(str(ai100_folder), embed._tokenizer, str(sentence_model))
    assert np.allclose(chosen(["goat"]), alone, atol=1e-6)


def test_without_a_sentence_model_the_served_one_does(ai100_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ai100_folder)
    embed = local_embedding(str(ai100_folder), tokenizer)
    assert np.allclose(embed(["goat"]), InputVectors.of_model(str(ai100_folder), tokenizer)(["goat"]))
    with pytest.raises(OSError, match="nothing-here"):
        local_embedding(str(ai100_folder), tokenizer, str(tmp_path / "nothing-here"))


def test_a_text_is_embedded_once() -> None:
    asked: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.ones((len(texts), 2), np.float32)

    remembered = Remembered(embed)
    remembered(["a", "b", "a"])
    remembered(["b", "c"])
    assert asked == ["a", "b", "c"]
