"""Text from tokens: whole characters only, and stop strings that don't depend on how the text was cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvarena.engines.base import GeneratedToken
from kvarena.server.text import Detokenizer, StopRule, StopStrings, TextStream, TokenTexts
from support.scripted_engine import tokenizer

texts = st.text(max_size=40).filter(lambda text: "\ufffd" not in text)
short = st.text("ab🦜ü", min_size=1, max_size=4)


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return ids


@given(texts, st.text("abü🦜 ", max_size=8))
def test_pieces_are_the_text_and_never_a_part_of_a_character(text: str, prompt: str) -> None:
    detokenizer = Detokenizer(tokenizer(), ids_of(prompt))
    pieces = [detokenizer.push(token_id) for token_id in ids_of(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, len(tokenizer()) - 1), max_size=40), st.lists(st.integers(0, 300), max_size=5))
def test_any_tokens_have_a_text(token_ids: list[int], prompt: list[int]) -> None:
    """Also those that are no text, after prompts that end within a character; nothing of the prompt comes along."""
    detokenizer = Detokenizer(tokenizer(), prompt)
    out = "".join(detokenizer.push(token_id) for token_id in token_ids)
    known = [token_id for token_id in token_ids if token_id > 1]
    if not any("\ufffd" in text for text in (tokenizer().decode(known), tokenizer().decode(prompt))):
        assert out == tokenizer().decode(known)
    assert len(out) <= sum(len(tokenizer().decode([token_id])) for token_id in token_ids)


def test_a_character_in_several_tokens_comes_with_the_last() -> None:
    detokenizer = Detokenizer(tokenizer())
    assert [detokenizer.push(token_id) for token_id in ids_of("🦜")] == ["", "", "", "🦜"]


def test_a_space_before_the_first_word_stays() -> None:
    """Where a decoder drops the space of a text's first word, an answer isn't the text's beginning."""
    vocab = {"<unk>": 0, "▁tea": 1, "▁rain": 2}
    backend = Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert Detokenizer(spaced).push(2) == "rain"
    assert Detokenizer(spaced, [1]).push(2) == TokenTexts(spaced).text(2) == " rain"


def truncated(text: str, stops: list[str], *, include: bool) -> str:
    """Character by character: the first at which a stop string is complete ends the text."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)]
    return text


@given(st.lists(short, max_size=12), st.lists(short, max_size=4), st.booleans())
def test_stop_strings_end_the_text_wherever_it_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    finder = StopStrings(stops, include=include)
    out = ""
    for piece in pieces:
        out += finder.push(piece)
        assert truncated("".join(pieces), stops, include=include).startswith(out)
        if finder.found:
            break
    out += finder.flush()
    whole = "".join(pieces)
    assert out == truncated(whole, stops, include=include)
    assert finder.found == any(stop in whole for stop in stops)


@given(texts, st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_stop_strings_across_tokens(text: str, stops: list[str], include: bool) -> None:
    stream = TextStream(tokenizer(), [], StopRule(tuple(stops), include))
    out = ""
    for token_id in ids_of(text):
        out += stream.push(GeneratedToken(token_id)).text
        if stream.stopped:
            break
    rest = stream.flush()
    assert out + (rest.text if rest else "") == truncated(text, stops, include=include)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["###", "END"])
    assert [finder.push(piece) for piece in ("tea #", "# x", "EN", "d")] == ["tea ", "## x", "", "ENd"]


@given(texts)
def test_bytes_of_tokens_join_to_the_text(text: str) -> None:
    of = TokenTexts(tokenizer())
    assert b"".join(of.utf8(token_id) for token_id in ids_of(text)) == text.encode()


@pytest.mark.parametrize(("name", "expected"), [("<0xE2>", b"\xe2"), ("tea", b"tea")])
def test_bytes_of_byte_fallback_tokens(name: str, expected: bytes) -> None:
    backend = Tokenizer(models.BPE(vocab={name: 0, "a": 1}, merges=[], byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    assert TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend)).utf8(0) == expected
