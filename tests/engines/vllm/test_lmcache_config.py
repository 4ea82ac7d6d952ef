"""LMCache's own blender: its loader takes what we write, and it finds separators where text has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvarena.engines import base
from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.lmcache_blender import SUPPORTED, lmcache_config, special_string
from support.tiny_models import tiny_tokenizer

TOWN = Path(__file__).parents[3] / "backend" / "models" / "town"
CONFIG = BlendConfig(ratio=0.2, check_layer=2, separator=" # # ")
CHUNKS = ["The tea is old.", "A goat on the hill", "seven lamps"]


def test_lmcaches_own_loader_takes_every_key_as_it_is_meant() -> None:
    from lmcache.v1.config import LMCacheEngineConfig, validate_and_set_config_value

    loaded = LMCacheEngineConfig.from_defaults()
    written = lmcache_config(CONFIG, 1.5)
    assert all(validate_and_set_config_value(loaded, key, value) for key, value in written.items())
    assert {key: getattr(loaded, key) for key in written} == written
    before = dict(written)
    loaded.validate()
    assert {key: getattr(loaded, key) for key in written} == before, "LMCache corrects nothing"
    assert (written["blend_check_layers"], written["blend_recompute_ratios"]) == ([2], [0.2])
    assert (written["blend_special_str"], written["max_local_cpu_size"]) == (" # # ", 1.5)


@pytest.mark.parametrize(
    "other", [{"policy": "chunk_head"}, {"deviation": "values"}, {"num_filters": 2}, {"run_tokens": 8}]
)
def test_a_policy_that_lmcache_doesnt_have_is_refused(other: dict[str, Any]) -> None:
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=f"{name} {SUPPORTED[name]!r} only, not {value!r}"):
        lmcache_config(replace(CONFIG, **other), 1.0)


def like_llama() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a space before every text, one token that begins it, and words split at spaces."""
    pieces = ["<s>", *sorted(set("".join(CHUNKS) + " #▁end.7TheaWho?")), "▁#"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocabulary, [("▁", "#")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def split_by_lmcache(tokenizer: Any, special: str, text: str) -> list[str]:
    """The prompt's chunks as LMCache's `SegmentTokenDatabase` sees them, with its own code."""
    from lmcache.v1.token_database import SegmentTokenDatabase

    database = object.__new__(SegmentTokenDatabase)
    database.sep_tokens = torch.tensor(tokenizer.encode(special)[1:])
    database.sep_len = len(database.sep_tokens)
    pieces = database._fast_split_by_subtensor(torch.tensor(tokenizer.encode(text)))
    return [tokenizer.decode(piece, skip_special_tokens=True).strip() for piece in pieces]


@pytest.mark.parametrize("kind", ["bytes", "llama", "town"])
def test_lmcache_finds_the_separator_between_texts(kind: str) -> None:
    make: dict[str, Callable[[], Any]] = {"bytes": tiny_tokenizer, "llama": like_llama}
    make["town"] = lambda: AutoTokenizer.from_pretrained(TOWN)
    tokenizer, separator = make[kind](), "<note>" if kind == "town" else " # # "
    chunks = ["the goat", "a lamp", "tea"] if kind == "town" else CHUNKS
    prompt = separator.join(["Who?", *chunks, "Who?"])
    special = special_string(tokenizer, separator)
    assert split_by_lmcache(tokenizer, special, prompt)[1:-1] == chunks


def test_the_separator_itself_isnt_found_where_its_spaces_go_to_its_neighbours() -> None:
    prompt = " # # ".join(["Who?", *CHUNKS, "Who?"])
    assert len(split_by_lmcache(like_llama(), " # # ", prompt)) == 1


def test_a_separator_that_is_never_the_same_is_refused() -> None:
    class Reversing:
        """A token for each letter, in an order that depends on the text."""

        def encode(self, text: str) -> list[int]:
            return [ord(letter) * len(text) for letter in text]

    with pytest.raises(ValueError, match=r"reads the separator '##' differently .* set SEPARATOR to another"):
        special_string(cast("base.Tokenizer", Reversing()), "##")
