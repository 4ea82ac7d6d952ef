"""Tokens as a person reads them: the texts add up, every token has one kind, and differences are the true ones."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from figures import Figures, with_report
from support.small_openai_server import REPORT
from tokens import (
    AnswerToken,
    Span,
    answer_tokens_html,
    diff_html,
    first_difference,
    first_token_difference,
    kinds_of,
    read_answer_tokens,
    token_texts,
    tokens_html,
)

TEXT = 'The café of Zürich\nserves <b>tea</b> 🦜 & "cake".'


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A small byte-level BPE, whose tokens may be parts of letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    return tokenizer


def test_the_texts_of_a_byte_level_vocabulary_add_up_to_the_text(byte_level: Tokenizer) -> None:
    names = byte_level.encode(TEXT).tokens
    texts = token_texts(names)
    assert "".join(texts) == TEXT
    assert len(texts) == len(names)
    assert "" in texts, "a letter of several tokens stands with its last one"
    assert token_texts(["<s>", "▁The", "▁café"]) == ["<s>", " The", " café"]


def test_each_token_has_the_kind_of_the_last_source_over_it_and_its_chunk() -> None:
    report = REPORT | {"spans": [{"start": 1, "end": 4, "source": "reused"}], "recomputed_spans": [[2, 3]]}
    figures = with_report(Figures(), report)
    assert figures.recomputed == ((2, 3),)
    kinds = kinds_of(5, [*figures.spans, *(Span(a, b, "recomputed") for a, b in figures.recomputed)])
    assert kinds == ["", "reused", "recomputed", "reused", ""]
    html = tokens_html("<A>", [" <x>", " a", " b", " c", " d"], kinds, [(1, "first"), (3, "")])
    assert "<b>&lt;A&gt;</b>" in html
    assert '<u tabindex="-1" title="token 2: recomputed, first"> b</u>' in html
    assert '<u tabindex="-1" title="token 3: reused"> c</u>' in html
    assert "</i>2 reused" in html
    assert with_report(Figures(), REPORT).recomputed is None


def test_a_recomputed_token_says_its_score_and_who_looks_at_it_where_the_policy_knows() -> None:
    told = {"what": "attention", "tokens": [[1, 0.25, 3], [2, 0.125]]}
    figures = with_report(Figures(), REPORT | {"token_scores": told})
    html = tokens_html("A", [" a", " b", " c", " <who>"], ["", "recomputed", "recomputed", ""], [], figures.scores)
    assert 'title="token 1: recomputed\nattention: 0.25, most from “&lt;who&gt;”"' in html
    assert 'title="token 2: recomputed\nattention: 0.125"' in html
    assert 'title="token 3"' in html
    assert "attention" not in tokens_html("A", [" a"], ["recomputed"], [], with_report(Figures(), REPORT).scores)


def test_a_recomputed_token_says_which_chunk_it_leans_on() -> None:
    told = {"what": "share of its attention, layer 1", "tokens": [[4, 1, 3, 0.25], [5, 7, 9, 0.5]]}
    figures = with_report(Figures(), REPORT | {"leans_on": told})
    chunks = [(1, "<one>"), (3, ""), (4, "two"), (6, "")]
    html = tokens_html("A", list("abcdefghij"), ["recomputed"] * 10, chunks, figures.scores)
    assert 'title="token 4: recomputed, two\nleans on &lt;one&gt;: 25.0%, share of its attention, layer 1"' in html
    assert "leans on tokens 7 to 9: 50.0%" in html, "a chunk that isn't among those of the context"
    assert html.count("leans on") == 2


def test_tokens_of_an_answer_keep_its_white_space() -> None:
    entries = [{"token": token, "logprob": 0.0} for token in ("The", "mayor", "\ufffd", "!", "</s>")]
    tokens = read_answer_tokens(" The  mayor!", entries)
    assert [token.text for token in tokens] == [" The", "  mayor", "\ufffd", "!"]


def test_a_paragraph_that_ends_with_two_tokens_has_one_blank_line_after_it() -> None:
    text = "\n\nAnn.\n\nBen\n \n."
    entries = [{"token": token, "logprob": 0.0} for token in ("\n", "\n", "Ann.", "\n", "\n", "Ben", "\n", "\n", ".")]
    tokens = read_answer_tokens(text, entries)
    assert "".join(token.text for token in tokens) == text
    assert re.sub("<[^>]+>", "", answer_tokens_html(tokens)) == text.lstrip()


@pytest.mark.parametrize(
    ("text", "exact", "difference"),
    [
        ("Ann keeps bees", " Ann  keeps bees\n", None),
        ("Ann keeps owls", "Ann keeps bees", 3),
        ("Ann", "Ann keeps", 2),
        ("", "", None),
    ],
)
def test_the_first_word_that_differs(text: str, exact: str, difference: int | None) -> None:
    assert first_difference(text, exact) == difference


def test_a_diff_has_all_words_of_both_answers_and_no_markup_of_theirs() -> None:
    assert diff_html("Ann keeps <b>owls", "Ann keeps bees") == "Ann keeps <del>bees</del><ins>&lt;b&gt;owls</ins>"
    assert diff_html("Ann keeps no bees now", "Ann keeps bees now") == "Ann keeps <ins>no </ins>bees now"
    assert diff_html("Ann, of the town", "Ann keeps bees, and one of them is the queen") == (
        "<del>Ann keeps bees, and one of them is the queen</del><ins>Ann, of the town</ins>"
    ), "not word by word where few are shared"
    ours, theirs = (tuple(AnswerToken(text, 1.0) for text in texts) for texts in (("a", "b"), ("a", "b", "c")))
    assert first_token_difference(ours, theirs) == 3
    assert first_token_difference(ours, ours) is None
    assert first_token_difference((), theirs) is None
