"""Separators are found in the text of the tokens, whatever tokens carry them."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvarena.core.matching import Segmenter
from kvarena.core.plan import as_token_ids
from support.tiny_models import random_text, tiny_tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As in SentencePiece models: white space is a mark on the next token, and decoders drop the first one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    text = [random_text(random.Random(0), 200) + " # # part ## x"]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"byte-level": tiny_tokenizer, "metaspace": metaspace_tokenizer}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("separator", [" # # ", " # ", "##", " ## "])
def test_segments_are_the_texts_between_separators(kind: str, separator: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    rng = random.Random(3)
    texts = [random_text(rng, rng.randrange(1, 40)) for _ in range(8)]
    ids = as_token_ids(tokenizer.encode(separator.join(texts), add_special_tokens=False))
    segments = Segmenter(tokenizer, separator).segments(ids)
    decoded = [tokenizer.decode(ids[start:end]).strip().removeprefix(separator.strip()) for start, end in segments]
    assert [text.strip() for text in decoded] == texts[:-1]
    assert [start for start, _ in segments[1:]] == [end for _, end in segments[:-1]]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_headings_are_no_separators(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = as_token_ids(tokenizer.encode("a ## Heading\n# Title # tea ### x#y # #z", add_special_tokens=False))
    assert Segmenter(tokenizer, " # # ").segments(ids) == []


def test_a_boundary_inside_a_token_is_noticed() -> None:
    """A tokenizer that has a token of a text's end and a separator: then the chunk isn't what it is elsewhere."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(["lamp tea goat road##"] * 9, trainers.BpeTrainer(special_tokens=["<unk>"]))
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    segmenter = Segmenter(merging, "##")
    for text, cut in (
        ("tea ##lamp tea ##goat tea ##", [False, False, False]),
        ("tea ##lamp road##goat tea ##", [False, True, True]),
    ):
        ids = as_token_ids(merging.encode(text, add_special_tokens=False))
        segments = segmenter.segments(ids)
        assert [segmenter.is_cut(ids, *segment) for segment in segments] == cut

    tiny = tiny_tokenizer()
    whole = random_text(random.Random(6), 40)
    ids = as_token_ids(tiny.encode(f"{whole} old cat"))
    for text, is_cut in ((whole, False), (whole[:-2], True)):
        (segment,) = Segmenter(tiny, "").segments(ids, [text])
        for named in (text, tiny.encode(text)):
            assert Segmenter(tiny, "").is_cut(ids, *segment, Segmenter(tiny, "").texts([named])) is is_cut


def test_a_separator_of_other_alphabets_is_refused() -> None:
    with pytest.raises(ValueError, match="ASCII"):
        Segmenter(tiny_tokenizer(), " § ")


def test_named_texts_are_found_where_their_ends_tokenise_differently() -> None:
    tokenizer = tiny_tokenizer()
    rng = random.Random(5)
    texts = [random_text(rng, 30) for _ in range(3)]
    prompt = "system" + "".join(texts[i] for i in (2, 0, 1)) + "?"
    ids = as_token_ids(tokenizer.encode(prompt))
    segments = Segmenter(tokenizer, "").segments(ids, texts)
    assert segments == Segmenter(tokenizer, "").segments(ids, [tokenizer.encode(text) for text in texts])
    found = [tokenizer.decode(ids[start:end]) for start, end in segments]
    assert len(found) == 3
    for text, i in zip(found, (2, 0, 1), strict=True):
        assert text.strip() in texts[i]
        assert len(text) > len(texts[i]) - 16


def test_no_tokenizer_no_segments() -> None:
    assert Segmenter(None, " # # ").segments(as_token_ids([1, 2, 3]), ["text"]) == []
