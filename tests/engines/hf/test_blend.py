"""The blend over Hugging Face models against stock forwards of the same weights, on tiny random models in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.prefilled_model import LayerKV, TokenFilter
from kvarena.core.report import MIN_RATIO
from kvarena.core.store import FoundKV
from kvarena.engines.hf.blend import BlendableModel, BlendedPrefill, HFPrefilledModel
from kvarena.engines.hf.model import HFModel, UnsupportedModel
from kvarena.policies.params import POLICIES, BlendParams
from kvarena.stores.memory import MemoryStore
from support import families
from support.blended import Blended, cached_kv, chunk_spans, make_prompts
from support.references import CacheBlend
from support.tiny_models import FAMILIES, tiny_tokenizer

ALL, NONE = BlendParams("all"), BlendParams("none")
NUM_TOKENS = 16


@pytest.fixture(scope="module", params=[*FAMILIES])
def any_blended(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Iterator[Blended]:
    blended = Blended.load(model_folders[request.param])
    yield blended
    blended.model.close()


@pytest.fixture
def blended(model_folders: dict[str, Path]) -> Iterator[Blended]:
    blended = Blended.load(model_folders["llama"])
    yield blended
    blended.model.close()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def assert_exact(blended: Blended, prompts: list[str], params: BlendParams) -> None:
    """Logits, KV and a greedy answer are those of a full prefill."""
    for ids in map(blended.encode, prompts):
        result = blended.prefill(ids, params)
        kv, logits = blended.blind(ids, [])
        assert_close(result.kv.filled(0, len(ids)), kv)
        assert_close(result.logits, logits)
        assert blended.greedy(result, NUM_TOKENS) == blended.generate(ids, NUM_TOKENS)


def assert_blind(blended: Blended, prompts: list[str], params: BlendParams = NONE) -> None:
    """Without recomputing, KV and logits are those of spans that see nothing else."""
    for ids in map(blended.encode, prompts):
        for _ in ("new chunks are computed alone", "and come from the store"):
            result = blended.prefill(ids, params)
            kv, logits = blended.blind(ids, chunk_spans(result.report))
            assert_close(result.kv.filled(0, len(ids)), kv)
            assert_close(result.logits, logits)
        assert result.report.num_reused_tokens > 100


def tiny_model(kind: str, **settings: Any) -> HFModel:
    """Four layers of a family that is only looked at."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": 384, "head_dim": 32, "num_hidden_layers": 4, "max_position_embeddings": 1024}
    attention = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(kind, **(shape | sizes | settings))
    torch.manual_seed(0)
    return HFModel(AutoModelForCausalLM.from_config(config, attn_implementation=attention), tiny_tokenizer())


@pytest.mark.parametrize("piece_tokens", [512, 50])
@pytest.mark.parametrize("params", [ALL, BlendParams(ratio=1.0)], ids=["all", "ratio one"])
def test_ratio_one_equals_full_prefill(
    any_blended: Blended, monkeypatch: pytest.MonkeyPatch, params: BlendParams, piece_tokens: int
) -> None:
    monkeypatch.setattr(any_blended.model, "piece_tokens", piece_tokens)
    assert_exact(any_blended, make_prompts(0, 2), params)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if BlendParams(policy).goes_by_ratio])
def test_ratio_one_and_zero_are_the_same_with_every_policy(blended: Blended, policy: str) -> None:
    prompts = make_prompts(22, 3)
    assert_exact(blended, prompts, BlendParams(policy, ratio=1.0))
    assert_blind(blended, prompts, BlendParams(policy, ratio=0.0))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_does_the_same_each_time(blended: Blended, policy: str) -> None:
    ids = blended.encode(make_prompts(23, 1)[0])
    blended.prefill(ids, NONE)  # from then on the chunks are known
    first, second = (blended.prefill(ids, BlendParams(policy, ratio=0.2)) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert first.report.num_recomputed_tokens == second.report.num_recomputed_tokens
    assert not first.report.blend_failures


def test_ratio_zero_equals_chunks_that_see_nothing_else(any_blended: Blended) -> None:
    assert_blind(any_blended, make_prompts(1, 3))


@pytest.mark.parametrize("piece_tokens", [512, 50])
@pytest.mark.parametrize(("ratio", "check_layer"), [(0.15, 1), (0.4, 2), (0.2, 3)])
def test_kv_deviation_equals_cacheblend_written_out(
    any_blended: Blended, monkeypatch: pytest.MonkeyPatch, ratio: float, check_layer: int, piece_tokens: int
) -> None:
    monkeypatch.setattr(any_blended.model, "piece_tokens", piece_tokens)
    reference = CacheBlend(any_blended.reference.config.name_or_path, {check_layer: ratio})
    for ids in map(any_blended.encode, make_prompts(2, 2)):
        assert_equals_cacheblend(any_blended, reference, ids, BlendParams(ratio=ratio, check_layer=check_layer))


@pytest.mark.parametrize("piece_tokens", [512, 50])
@pytest.mark.parametrize(
    ("params", "ratios"),
    [
        (BlendParams(ratio=0.2, deviation="values"), {1: 0.2}),
        (BlendParams(ratio=0.2, num_filters=3), {1: 0.4, 2: 0.3, 3: 0.2}),
        (BlendParams(ratio=0.2, check_layer=2, num_filters=9, deviation="values"), {2: 0.4, 3: 0.2}),
    ],
    ids=["values", "three filters", "no more filters than layers"],
)
def test_its_variants_equal_cacheblend_written_out(
    blended: Blended,
    monkeypatch: pytest.MonkeyPatch,
    params: BlendParams,
    ratios: dict[int, float],
    piece_tokens: int,
) -> None:
    monkeypatch.setattr(blended.model, "piece_tokens", piece_tokens)
    reference = CacheBlend(blended.reference.config.name_or_path, ratios, asdict(params)["deviation"])
    for ids in map(blended.encode, make_prompts(2, 2)):
        assert_equals_cacheblend(blended, reference, ids, params)


def assert_equals_cacheblend(blended: Blended, reference: CacheBlend, ids: list[int], params: BlendParams) -> None:
    """With new chunks, and with the same from the store."""
    for _ in range(2):
        result = blended.prefill(ids, params)
        spans = [{"start": start, "end": end} for start, end in chunk_spans(result.report)]
        end = spans[-1]["end"]
        kv = cached_kv(reference.blended_kv(torch.tensor([ids[:end]]), spans))
        assert_close(result.kv.filled(0, end), kv)
        assert result.report.store_errors == 0
    assert result.report.num_recomputed_tokens == reference.num_selected


@pytest.mark.parametrize(
    ("params", "num_tokens"),
    [(BlendParams("chunk_head", 0.1), None), (BlendParams("chunk_head", 0.1, head_tokens=7), 7)],
    ids=["a share", "a number"],
)
def test_chunk_head_equals_the_heads_recomputed(any_blended: Blended, params: BlendParams, num_tokens: int) -> None:
    reference = CacheBlend(any_blended.reference.config.name_or_path, {})
    for ids in map(any_blended.encode, make_prompts(2, 2)):
        any_blended.prefill(ids, NONE)
        result = any_blended.prefill(ids, params)
        spans = result.report.spans
        counts = [num_tokens or math.ceil(0.1 * (end - start)) for start, end in spans]
        heads = [torch.arange(start, start + count) for (start, _), count in zip(spans, counts, strict=True)]
        assert_equals_recomputed(any_blended, reference, ids, result, torch.cat(heads))


@pytest.mark.parametrize("piece_tokens", [512, 4])
@pytest.mark.parametrize("check_layer", [0, 1, 3])
def test_query_attention_equals_it_written_out(
    any_blended: Blended, monkeypatch: pytest.MonkeyPatch, check_layer: int, piece_tokens: int
) -> None:
    """The queries are those of a stock forward in which chunks see nothing but themselves, and the question all."""
    monkeypatch.setattr(any_blended.model, "piece_tokens", piece_tokens)
    reference = CacheBlend(any_blended.reference.config.name_or_path, {})
    for ids in map(any_blended.encode, make_prompts(2, 2)):
        any_blended.prefill(ids, NONE)
        result = any_blended.prefill(ids, BlendParams("query_attention", 0.1, check_layer))
        spans = result.report.spans
        in_spans = torch.cat([torch.arange(start, end) for start, end in spans])
        scores = any_blended.attention_of_question(ids, spans, check_layer)
        chosen = in_spans[scores.topk(math.ceil(0.1 * len(in_spans))).indices].sort().values
        assert_equals_recomputed(any_blended, reference, ids, result, chosen)


def assert_equals_recomputed(
    blended: Blended, reference: CacheBlend, ids: list[int], result: BlendedPrefill, chosen: torch.Tensor
) -> None:
    spans = [{"start": start, "end": end} for start, end in result.report.spans]
    end = spans[-1]["end"]
    kv = cached_kv(reference.kv_with_chosen(torch.tensor([ids[:end]]), spans, chosen))
    assert_close(result.kv.filled(0, end), kv)
    assert result.report.num_recomputed_tokens == len(chosen)
    recomputed = [at for start, end in result.report.recomputed_spans for at in range(start, end)]
    assert recomputed == sorted(chosen.tolist())
    assert result.report.store_errors == 0


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    blended = Blended.load(families.save_family(tmp_path, name))
    assert_blind(blended, make_prompts(3, 2))
    assert_exact(blended, make_prompts(3, 1), ALL)
    assert_exact(blended, make_prompts(3, 1), BlendParams(ratio=1.0, check_layer=2))
    for params in (BlendParams(ratio=0.2, check_layer=2), BlendParams(ratio=0.2, num_filters=3)):
        report = blended.prefill(blended.encode(make_prompts(3, 1)[0]), params).report
        assert (report.num_recomputed_tokens > 0, report.store_misses) == (True, 0)
        assert report.store_errors == 0
    without_rotation = {"smollm3": [1, 3], "cohere2": [3]}.get(name, [])
    rotations = BlendableModel(blended.model).rotations
    assert [layer for layer, rotation in enumerate(rotations) if rotation is None] == without_rotation
    assert len(set(rotations) - {None}) == (2 if name.startswith("gemma3") else 1)
    blended.model.close()


def test_layers_that_all_have_a_short_window(tmp_path: Path) -> None:
    blended = Blended.load(families.save_kind(tmp_path, "mistral", sliding_window=24))
    assert_blind(blended, make_prompts(3, 2))
    assert_exact(blended, make_prompts(3, 1), BlendParams(ratio=1.0, check_layer=2))
    blended.model.close()


def test_a_model_with_one_mask_for_layers_of_different_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3_text", sliding_window=48, layer_types=families.MIXED)
    forward = model.module.forward

    def with_one_mask(attention_mask: Any = None, **arguments: Any) -> Any:
        return forward(attention_mask=attention_mask if attention_mask is None else attention_mask.clone(), **arguments)

    monkeypatch.setattr(model.module, "forward", with_one_mask)
    with pytest.raises(UnsupportedModel, match="takes no masks by kind of layer"):
        BlendableModel(model)
    model.close()


def test_without_chunks_it_is_the_prefill_itself(blended: Blended) -> None:
    ids = blended.encode(make_prompts(5, 1)[0].replace(" # # ", " "))
    result = blended.prefill(ids, BlendParams())
    kv = blended.model.new_kv(len(ids))
    assert torch.equal(result.logits, blended.model.prefill(kv, ids, lambda: False))
    assert torch.equal(result.kv.filled(0, len(ids)), kv.filled(0, len(ids)))
    assert (result.report.num_computed_tokens, result.report.spans) == (len(ids), [])


def test_chunks_are_computed_once_wherever_they_stand(blended: Blended) -> None:
    first, second = map(blended.encode, make_prompts(6, 2))
    cold = blended.prefill(first, NONE).report
    assert (cold.store_hits, cold.store_misses) == (0, 4)
    assert (cold.num_reused_tokens, cold.num_computed_tokens, cold.spans) == (0, len(first), [])
    warm = blended.prefill(second, NONE).report
    assert warm.store_hits >= 3
    before = blended.model.num_forward_tokens
    again = blended.prefill(second, NONE).report
    assert (again.store_hits, again.store_misses) == (4, 0)
    assert blended.model.num_forward_tokens - before == again.num_computed_tokens < 40


def test_known_chunks_are_found_without_separators(blended: Blended) -> None:
    (prompt,) = make_prompts(7, 1)
    blended.prefill(blended.encode(prompt), NONE)
    ids = blended.encode(prompt.replace(" # # ", " old road "))
    result = blended.prefill(ids, NONE)
    assert result.report.num_reused_tokens > len(ids) / 2
    assert_close(blended.prefill(ids, ALL).logits, blended.blind(ids, [])[1])


@pytest.mark.parametrize("sink", [(), (0,)], ids=["alone", "after a sink"])
def test_what_begins_the_prompt_is_exact_and_not_chosen(model_folders: dict[str, Path], sink: tuple[int, ...]) -> None:
    blended = Blended.load(model_folders["llama"], sink=sink)
    ids = [*sink, *blended.encode(make_prompts(8, 1, first_words=40)[0])]
    report = blended.prefill(ids, BlendParams(ratio=1e-6)).report
    assert report.computed_spans[0][0] == 0
    result = blended.prefill(ids, BlendParams(ratio=0.5))
    (_, end), *others = result.report.spans
    assert result.report.num_recomputed_tokens == -(-sum(high - low for low, high in others) // 2)
    assert_close(result.kv.filled(0, end), blended.blind(ids, [])[0][:, :, :, :end])


def test_what_follows_the_sink_in_the_prompt_is_exact_and_not_chosen(blended: Blended) -> None:
    """And a text at the prompt's beginning, where there is no sink before it, isn't."""
    text = blended.encode(make_prompts(8, 1, first_words=40)[0])
    alone = blended.prefill(text, BlendParams(ratio=0.5))
    in_spans = sum(end - start for start, end in alone.report.spans)
    assert alone.report.num_recomputed_tokens == -(-in_spans // 2)
    ids = [*blended.sink, *text]
    first, *others = blended.prefill(ids, NONE).report.spans
    assert first[0] == len(blended.sink), "found where no separator marks it"
    result = blended.prefill(ids, BlendParams(ratio=0.5))
    assert result.report.num_recomputed_tokens == -(-sum(end - start for start, end in others) // 2)
    end = first[1]
    assert_close(result.kv.filled(0, end), blended.blind(ids, [])[0][:, :, :, :end])


@pytest.mark.parametrize("params", [NONE, ALL, BlendParams(ratio=0.3, check_layer=2)], ids=["none", "all", "some"])
@pytest.mark.parametrize("sink_tokens", [0, 1, 3])
def test_sinks_of_any_length_do_what_is_written_out(
    model_folders: dict[str, Path], sink_tokens: int, params: BlendParams
) -> None:
    """A sink is what the chat template begins every prompt with."""
    model = HFModel.load(str(model_folders["llama"]), device="cpu", dtype="float32")
    beginning = model.tokenizer.encode("<s>the old road\n")
    template = "<s>the old road\n" + str(getattr(model.tokenizer, "chat_template"))  # noqa: B009
    setattr(model.tokenizer, "chat_template", template)  # noqa: B010
    reference = AutoModelForCausalLM.from_pretrained(model_folders["llama"], dtype=torch.float32).eval()
    blended = Blended(model, reference, sink=tuple(beginning[:sink_tokens]))
    prompts = make_prompts(24, 2)
    if params is ALL:
        assert_exact(blended, prompts, params)
    elif params is NONE:
        assert_blind(blended, prompts)
    else:
        for ids in map(blended.encode, prompts):
            blended.prefill(ids, params)  # from then on the chunks are known
            report = blended.prefill(ids, params).report
            assert report.num_recomputed_tokens == -(
                -3 * (report.num_reused_tokens + report.num_recomputed_tokens) // 10
            )
    model.close()


def test_random_recomputes_the_same_share_each_time(blended: Blended) -> None:
    ids = blended.encode(make_prompts(9, 1)[0])
    results = [blended.prefill(ids, BlendParams("random", ratio=0.25)) for _ in range(2)]
    assert torch.equal(results[0].logits, results[1].logits)
    report = results[1].report
    reused = torch.cat([torch.arange(start, end) for start, end in report.spans])
    assert report.num_recomputed_tokens == -(-len(reused) // 4)
    blind, _ = blended.blind(ids, report.spans)
    deviation = (results[1].kv.filled(0, len(ids)) - blind)[-1, :, :, reused].abs().amax(dim=(0, 1, 3))
    # A chosen token of the first chunk may have nothing new to see.
    assert report.num_recomputed_tokens * 0.8 < (deviation > 2e-3).sum() <= report.num_recomputed_tokens


@pytest.mark.parametrize("loses", ["everything", "every other", "with an error", "shapes"])
def test_a_bad_store_costs_time_only(model_folders: dict[str, Path], loses: str) -> None:
    class BadStore(MemoryStore):
        @contextmanager
        def retrieval(self, chunks: Sequence[Chunk]) -> Iterator[FoundKV]:
            with super().retrieval(chunks) as retrieval:
                yield FoundKV([self._spoilt(i, kv) for i, kv in enumerate(retrieval.found)])

        def _spoilt(self, number: int, kv: torch.Tensor | None) -> torch.Tensor | None:
            if loses == "with an error":
                raise ConnectionError("store is down")
            if loses == "shapes":
                return kv if kv is None else kv[:, :, :5]
            return None if loses == "everything" or number % 2 else kv

    blended = Blended.load(model_folders["llama"], store=BadStore(1 << 28))
    prompts = make_prompts(10, 3)
    assert_exact(blended, prompts, ALL)
    result = blended.prefill(blended.encode(prompts[0]), BlendParams(ratio=0.3))
    if loses in ("with an error", "shapes"):
        assert (result.report.blend_failures, result.report.store_errors) == (1, 0)
        assert_close(result.logits, blended.blind(blended.encode(prompts[0]), [])[1])


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        *((*model, rf"length of the text \({name}\)") for name, model in families.LENGTH_DEPENDENT.items()),
        ("gpt2", {"n_embd": 64, "n_head": 2, "n_layer": 4}, "without rotary embeddings"),
        ("llama", {"attn_implementation": "eager"}, "attention is 'eager'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cant_be_blended_is_refused(kind: str, settings: dict[str, Any], reason: str) -> None:
    model = tiny_model(kind, **settings)
    with pytest.raises(UnsupportedModel, match=f"can't be blended: .*({reason})"):
        BlendableModel(model)
    model.close()


def test_keys_that_turn_otherwise_than_their_table_says_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k * cos[:, None]))
    with pytest.raises(UnsupportedModel, match="keys of layer 0 don't rotate"):
        BlendableModel(model)
    model.close()


@pytest.mark.parametrize("policy", ["kv_deviation", "chunk_head", "query_attention"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_time_for_the_blend_decides_on_the_ratio(blended: Blended, policy: str, ratio: float) -> None:
    """Whatever the ratio is with which it begins; with time enough the prompt is computed whole."""
    first, *others = map(blended.encode, make_prompts(21, 4))
    params = BlendParams(policy, ratio=ratio)

    def within(ids: list[int], budget_ms: float) -> BlendedPrefill:
        result = blended.blender.prefill(ids, params, 64, budget_ms=budget_ms)
        assert not result.report.blend_failures
        return result

    assert within(first, 1e9).report.ratio == ratio
    blended.prefill(others[0], BlendParams(policy, ratio=0.3))
    late, in_time = within(others[1], -1.0), within(others[2], 1e9)
    assert late.report.ratio == MIN_RATIO
    assert 0 < late.report.num_recomputed_tokens < 0.05 * len(others[1])
    assert in_time.report.ratio == 1.0
    kv, logits = blended.blind(others[2], [])
    assert_close(in_time.kv.filled(0, len(others[2])), kv)
    assert_close(in_time.logits, logits)


def test_a_check_layer_beyond_the_last_is_refused(blended: Blended) -> None:
    with pytest.raises(ValueError, match="check_layer must be from 0 to 3, not 4"):
        blended.prefill(blended.encode("old road"), BlendParams(check_layer=4))


def test_hooks_are_gone_after_a_failure(blended: Blended) -> None:
    def fail(positions: torch.Tensor, fresh: LayerKV) -> torch.Tensor:
        raise RuntimeError(f"{len(positions)} positions, keys {tuple(fresh.keys.shape)}")

    engine = BlendableModel(blended.model)
    prompt = HFPrefilledModel(engine, as_token_ids(range(2, 50)), blended.model.new_kv(48))
    with pytest.raises(RuntimeError, match=r"48 positions, keys \(48, 2, 32\)"):
        blended.model.run(prompt.forward, torch.arange(48), [TokenFilter(2, fail)])
    assert not any(layer._forward_pre_hooks for layer in engine.layers)
