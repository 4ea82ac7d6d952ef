"""The training code on a tiny model: what is exported is what was trained, and a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TRAINING = Path(__file__).parents[2] / "backend" / "training"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def training_code() -> Iterator[None]:
    """The scripts import one another by bare names, which other modules have too; only these tests see them."""
    names = {script.stem for script in TRAINING.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    sys.path.insert(0, str(TRAINING))
    yield
    sys.path.remove(str(TRAINING))
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def start(folder: Path, tokenizer_folder: Path) -> Any:
    from train import Training

    from settings import Settings

    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").symlink_to(tokenizer_folder)
    settings = Settings(tokens=1_000_000, hidden_size=64, intermediate_size=64, num_layers=2, warmup_steps=2)
    return Training(folder, settings, torch.device("cpu"))


def run(training: Any, num_steps: int) -> None:
    from train import Display

    with Display() as display:
        training.run(display, num_steps, num_workers=0)


def test_a_resumed_run_is_the_same_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    whole = start(tmp_path / "whole", tokenizer_folder)
    run(whole, 4)
    run(start(tmp_path / "parts", tokenizer_folder), 2)
    resumed = start(tmp_path / "parts", tokenizer_folder)
    assert resumed.progress.step == 2
    run(resumed, 2)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    ours, theirs = (dataclasses.asdict(training.progress) | {"elapsed_s": 0} for training in (whole, resumed))
    assert ours == theirs


def test_the_loss_falls(tmp_path: Path, tokenizer_folder: Path) -> None:
    import json

    run(start(tmp_path / "run", tokenizer_folder), 40)
    first, last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert last["answer_loss"] < 0.8 * first["answer_loss"]


def test_the_export_computes_what_was_trained(tmp_path: Path, tokenizer_folder: Path) -> None:
    """In `export` itself; here that it would notice."""
    from export import check_equal, export, hugging_face_model

    training = start(tmp_path / "run", tokenizer_folder)
    export(training, tmp_path / "export")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "kvarena.json",
    }
    other = hugging_face_model(training)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="logits differ"):
        check_equal(training, other)


def test_branches_do_not_see_each_other(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A branch in a row has the logits of the same question asked alone after the same context."""
    from rows import make_batch

    from settings import SHORT, STAGES

    training = start(tmp_path / "run", tokenizer_folder)
    batch = make_batch(training.coder, SHORT, STAGES[2].mix, random.Random(1))
    with torch.no_grad():
        hidden = training.model(batch.ids, batch.positions, batch.branch_mask)[0]
        context = int((batch.labels[0, : SHORT.context_tokens] == 0).sum()) + 1
        start_at = SHORT.context_tokens
        end = start_at + 1
        while batch.positions[0, end] > context:
            end += 1
        second_end = end + 1
        while batch.positions[0, second_end] > context:
            second_end += 1
        alone = torch.cat((batch.ids[0, :context], batch.ids[0, end:second_end]))[None]
        mask = torch.ones(1, 1, 1, alone.shape[1], dtype=torch.bool)
        expected = training.model(alone, torch.arange(alone.shape[1])[None], mask)[0, context:]
    torch.testing.assert_close(hidden[end:second_end], expected, atol=1e-5, rtol=1e-4)


def test_naive_reuse_in_one_forward_is_moved_chunks(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A chunk's hidden states under the block mask are those of the chunk alone at positions from 0."""
    from evaluate import MIX, chunks_alone_mask
    from rows import make_batch
    from tokenizer import NOTE_ID

    from settings import SHORT

    training = start(tmp_path / "run", tokenizer_folder)
    batch = make_batch(training.coder, SHORT, MIX, random.Random(1))
    context = batch.ids[:1, : SHORT.context_tokens]
    first, second = (context[0] == NOTE_ID).nonzero().flatten()[:2].tolist()
    chunk = context[:, first:second]
    last = torch.ones(1, 1, 1, chunk.shape[1], dtype=torch.bool)
    with torch.no_grad():
        mask = chunks_alone_mask(batch.ids[:, : SHORT.context_tokens])
        inside = training.model(batch.ids, batch.positions, batch.branch_mask, mask)[0, first:second]
        alone = training.model(chunk, torch.arange(chunk.shape[1])[None], last)[0]
    torch.testing.assert_close(inside, alone, atol=1e-5, rtol=1e-4)


def test_rows_are_tokenised_as_the_chat_template_does(tokenizer: Any) -> None:
    from rows import TextCoder

    from kvarena.synthetic_qa import questions as chat
    from kvarena.synthetic_qa.facts import chunk_text
    from kvarena.synthetic_qa.questions import Quiz
    from kvarena.synthetic_qa.town import TownShape, write_town

    coder = TextCoder(tokenizer)
    for seed in range(20):
        rng = random.Random(seed)
        town = write_town(rng, TownShape(3, 30, 3))
        quiz, texts = Quiz(town, rng), [chunk_text(chunk) for chunk in town]
        for separator in chat.SEPARATORS:
            for asked in quiz.all_facts()[:2] + quiz.followups(2):
                messages = chat.messages(texts, asked.turns, separator)
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                whole = tokenizer.encode(f"{text}{asked.answer}</s>", add_special_tokens=False)
                row = coder.context(chat.SYSTEM_PROMPT, texts, separator) + coder.branch(asked, separator)[0]
                assert whole == row, separator


@pytest.mark.parametrize("text", ["Bruno keeps bees.", "Grüße, 日本語 😀!", "a\n\nb\tc  d", "x = {'y': [1.5e-3]}", ""])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    """But for a space that every line gets in front."""
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert decoded.replace("\n ", "\n") == text.replace("\n ", "\n")
    assert tokenizer.unk_token is None


def test_words_of_a_town_are_one_token_each(tokenizer: Any) -> None:
    from kvarena.synthetic_qa import words

    pools = (
        words.PEOPLE,
        words.SHOPS,
        words.STREETS,
        words.DAYS,
        words.TRADES,
        words.ANIMALS,
        words.ITEMS,
        words.GOODS,
    )
    for pool in pools:
        assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in pool)
    for word in words.PEOPLE:
        alone, inside = (tokenizer.encode(text, add_special_tokens=False) for text in (f"{word} is", f"This is {word}"))
        assert alone[0] == inside[-1] == tokenizer.encode(f"\n\n{word}", add_special_tokens=False)[-1]
