"""Prompts by the token: as long as they say, in a new order each time, and known to a blend as far as they say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvarena.bench.prompts import (
    FIXED_OPENING_TOKENS,
    OPENING_TOKENS,
    SCORED_CHUNKS,
    STATES,
    Cell,
    Prompts,
    Vocabulary,
    Workload,
    chunk_sizes,
)
from kvarena.core.matching import ChunkIndex, Planner, Segmenter
from kvarena.core.plan import as_token_ids
from kvarena.home import project_root
from kvarena.model import SHIPPED_MODELS, TOWN, load_tokenizer
from support.tiny_models import tiny_tokenizer

SEPARATOR = " # # "
TOKENIZER = tiny_tokenizer()
VOCABULARY = Vocabulary.of(TOKENIZER.backend_tokenizer, SEPARATOR)
WORKLOAD = Workload(chunk_tokens=64, question_tokens=20)
CONTEXT_TOKENS = 64 * 5 + 30


def prompts(seed: int = 0, context_tokens: int = CONTEXT_TOKENS) -> Prompts:
    return Prompts(VOCABULARY, WORKLOAD, context_tokens, random.Random(seed))


def chunks_of(prompt: Sequence[int]) -> list[tuple[int, ...]]:
    """Every chunk with the separator before it; the question is left out."""
    found = Segmenter(TOKENIZER, SEPARATOR).segments(as_token_ids(prompt))
    return [tuple(prompt[start:end]) for start, end in found if start]


@pytest.mark.parametrize("folder", [None, SHIPPED_MODELS[TOWN]])
def test_the_vocabulary_is_that_of_the_tokenizer_that_servers_load(folder: str | None, tmp_path: Path) -> None:
    if folder is None:
        tiny_tokenizer().save_pretrained(tmp_path)
    place = str(project_root() / folder) if folder else str(tmp_path)
    theirs = AutoTokenizer.from_pretrained(place)
    own = Vocabulary.of(load_tokenizer(place), SEPARATOR)
    words = {token for token in range(len(theirs)) if theirs.decode([token]).strip().isalpha()}
    words = {token for token in words if theirs.decode([token]).isascii()} - set(theirs.all_special_ids)
    assert own.words == sorted(words)
    assert own.separator == theirs.encode(SEPARATOR, add_special_tokens=False)
    assert [*own.special, *theirs.encode("a", add_special_tokens=False)] == theirs.encode("a")[: len(own.special) + 1]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("context_tokens", [64, CONTEXT_TOKENS, 70, 20])
def test_a_prompt_has_as_many_tokens_as_it_says(state: str, context_tokens: int) -> None:
    around = len(VOCABULARY.special) + OPENING_TOKENS + len(VOCABULARY.separator) + 20
    drawn = prompts(context_tokens=context_tokens)
    assert {len(drawn.draw(state)) for _ in range(5)} == {context_tokens + around}


@pytest.mark.parametrize(
    ("context_tokens", "sizes"), [(512, [256, 256]), (1000, [256, 256, 256, 232]), (520, [256, 264]), (100, [100])]
)
def test_chunks_of_a_size_and_a_rest(context_tokens: int, sizes: list[int]) -> None:
    assert chunk_sizes(context_tokens, 256) == sizes


def test_warm_prompts_are_the_same_chunks_in_other_orders() -> None:
    drawn = prompts()
    orders = [chunks_of(drawn.draw("warm")) for _ in range(6)]
    assert all(sorted(order) == sorted(chunks_of(drawn.teach())) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [len(chunk) for chunk in drawn.known] == [64] * 5 + [30]


@pytest.mark.parametrize("num_words", [1000, 83, 60])
def test_known_chunks_are_cut_from_a_text_that_comes_again_where_it_is_short(num_words: int) -> None:
    text = random.Random(7).choices(VOCABULARY.words, k=num_words)
    drawn = Prompts(VOCABULARY, WORKLOAD, CONTEXT_TOKENS, random.Random(0), text)
    words = [word for chunk in drawn.known for word in chunk[len(VOCABULARY.separator) :]]
    assert words[: len(text)] == text[: len(words)]
    assert set(words) <= set(text)
    known = chunks_of(drawn.teach())
    assert len(set(known)) == len(known) == 6
    assert sorted(chunks_of(drawn.draw("warm"))) == sorted(known)
    assert not set(chunks_of(drawn.draw("cold"))) & set(known)


def test_nothing_before_the_first_chunk_and_behind_the_last_is_the_same_twice() -> None:
    drawn = prompts()
    made = [drawn.draw("warm") for _ in range(20)]
    assert len({tuple(prompt[:OPENING_TOKENS]) for prompt in made}) == 20
    assert len({tuple(prompt[-20:]) for prompt in made}) == 20


def test_cold_and_half_prompts_bring_new_chunks() -> None:
    drawn = prompts()
    known = set(chunks_of(drawn.teach()))
    cold = [set(chunks_of(drawn.draw("cold"))) for _ in range(4)]
    assert not set.intersection(known, *cold)
    assert all(not one & other for one, other in itertools.combinations([known, *cold], 2))
    half = [chunks_of(drawn.draw("half")) for _ in range(4)]
    assert [[chunk in known for chunk in order] for order in half] == [[False, True] * 3] * 4


def test_without_chunks_no_separator() -> None:
    prompt = prompts().draw("none")
    assert chunks_of(prompt) == []
    assert set(prompt) <= {*VOCABULARY.special, *VOCABULARY.words}


@pytest.mark.parametrize(("state", "share"), [("warm", 1.0), ("half", 0.5), ("cold", 0.0), ("none", 0.0)])
def test_a_blend_knows_as_many_chunks_as_the_state_says(state: str, share: float) -> None:
    """Chunks of one size, so that shares are whole."""
    drawn = prompts(context_tokens=64 * 6)
    planner = Planner(ChunkIndex())
    segmenter = Segmenter(TOKENIZER, SEPARATOR)

    def spans(prompt: list[int]) -> list[bytes]:
        ids = as_token_ids(prompt)
        plan = planner.plan(ids, segmenter.segments(ids))
        assert sum(map(len, plan.spans)) == (0 if state == "none" and prompt is asked else 64 * 6)
        return [span.chunk.token_ids.tobytes() for span in plan]

    asked = drawn.draw(state)
    known = spans(drawn.teach())
    assert sum(chunk in known for chunk in spans(asked)) == share * 6


def test_what_needs_known_chunks_is_measured_first() -> None:
    workload = Workload((512, 64), ("none", "cold", "warm"), (1, 8))
    assert workload.cells[:2] == [Cell(512, "warm", 1), Cell(512, "warm", 8)]
    assert [cell.state for cell in workload.cells[::2]] == ["warm", "cold", "none"] * 2


def test_words_are_letters_and_no_special_tokens() -> None:
    assert not set(VOCABULARY.words) & set(TOKENIZER.all_special_ids)
    assert all(TOKENIZER.decode([word]).strip().isalpha() for word in VOCABULARY.words)
    assert TOKENIZER.decode(list(VOCABULARY.separator)) == SEPARATOR


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"states": ("lukewarm",)}, "'lukewarm'; it is one of warm, half, cold, none"),
        ({"context_tokens": (4,)}, r"--context-tokens is \(4,\); it takes numbers from 16"),
        ({"concurrency": (0,)}, "--concurrency"),
        ({"chunk_tokens": 8}, "--chunk-tokens is 8; chunks have at least 16"),
    ],
)
def test_bad_workloads(choices: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Workload(**choices)  # type: ignore[arg-type]


def test_without_a_prefix_cache_all_prompts_begin_alike() -> None:
    drawn = Prompts(VOCABULARY, replace(WORKLOAD, has_fixed_opening=True), CONTEXT_TOKENS, random.Random(0))
    begin = len(VOCABULARY.special) + FIXED_OPENING_TOKENS
    assert len({tuple(drawn.draw("warm")[:begin]) for _ in range(10)}) == 1
    assert drawn.teach()[:begin] == drawn.draw("cold")[:begin]


@pytest.mark.parametrize("num_chunks", [3, 5, 16, 17, 40, 100])
def test_scores_can_be_had_of_every_known_chunk(num_chunks: int) -> None:
    drawn = prompts(context_tokens=64 * num_chunks)
    taught = [chunks_of(prompt) for prompt in drawn.teach_scores()]
    assert {chunk for prompt in taught for chunk in prompt[1:-1]} == set(chunks_of(drawn.teach()))
    assert max(map(len, taught)) <= SCORED_CHUNKS
