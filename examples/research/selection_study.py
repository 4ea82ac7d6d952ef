"""Ways of telling which reused tokens need their context, compared along full prefill's answers.

    python examples/research/selection_study.py --num-questions 16 > study.md

SmolLM2-135M-Instruct in fp32 on the shipped documents, or another model and questions. Everything is teacher-forced:
KL of full prefill's distributions against the blend's (nats), and how often the likeliest token is the same (%), at
each of the first tokens of full prefill's answer. What docs/quality.md says of scores, probes, shifts and seams is from
here; none of it needs a server.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import kvarena.core.blend as blend_module
from kvarena.bench.quality.questions import EvalQuestion, load_questions
from kvarena.core.attention import ChunkScorer
from kvarena.core.plan import Chunk, ReusePlan, TokenIds, as_token_ids
from kvarena.core.policy import Selection, SelectionContext, SelectionPolicy, reused_positions, share_of
from kvarena.core.prefilled_model import EndForward, LayerKV
from kvarena.core.store import get
from kvarena.documents import TextChunk, join_chunks
from kvarena.engines.hf.blend import HFBlender, HFPrefilledModel
from kvarena.engines.hf.model import HFModel
from kvarena.engines.hf.sequence_kv import SequenceKV
from kvarena.model import find_model
from kvarena.policies.params import BlendParams, read_blend_profile
from kvarena.splitting import Splitter
from kvarena.stores.memory import MemoryStore

STORE_BYTES = 8 << 30
ANSWER_TOKENS = 24
NUM_PROBES = 4
CHECK_LAYER = 3
WINDOWS = (None, 256, 64)
WINDOW_SINK_TOKENS = 4
Scores = Mapping[Chunk, torch.Tensor]


@dataclass
class Seen:
    """What probe prompts showed of a chunk, added up: by layer `(L, T)` how far its values and keys lay from those that
    it has by itself (squared) and the attention from after it, and the values themselves `(L, T, H_kv * D)`.
    """

    values: torch.Tensor
    keys: torch.Tensor
    attention: torch.Tensor
    in_context: torch.Tensor
    num_probes: int = 1

    def add(self, other: Seen) -> None:
        for name in ("values", "keys", "attention", "in_context"):
            getattr(self, name).add_(getattr(other, name))
        self.num_probes += other.num_probes


class Probe(ChunkScorer):
    """A scorer that keeps what it saw by layer, of the values and of the keys."""

    found: dict[Chunk, Seen]

    def __init__(self, model: Any, plan: ReusePlan, alone: Mapping[int, Sequence[LayerKV]], end: int) -> None:
        super().__init__(model, plan, alone, end)
        self._alone_keys = {layer: torch.cat([group.keys for group in groups]) for layer, groups in alone.items()}
        self._keys_moved = torch.zeros(len(alone), end)
        self._fresh: dict[int, list[torch.Tensor]] = defaultdict(list)

    def observe(self, layer: int, positions: torch.Tensor, queries: torch.Tensor, fresh: LayerKV) -> None:
        super().observe(layer, positions, queries, fresh)
        places = self._places[positions]
        held = places >= 0
        moved = fresh.keys[held].float() - self._alone_keys[layer][places[held]].float()
        self._keys_moved[layer, positions[held]] = moved.square().sum(dim=(1, 2))
        self._fresh[layer].append(fresh.values.flatten(1).clone())

    def scores(self) -> dict[Chunk, torch.Tensor]:
        fresh = {layer: torch.cat(pieces) for layer, pieces in self._fresh.items()}
        for span in self._plan:
            if self._has_context(span):
                at = slice(span.start, span.end)
                values = torch.stack([fresh[layer][at] for layer in range(len(fresh))])
                seen = Seen(self._deviation[:, at], self._keys_moved[:, at], self._attention[:, at], values)
                if span.chunk in Probe.found:
                    Probe.found[span.chunk].add(seen)
                else:
                    Probe.found[span.chunk] = seen
        return {}


def relative(by_layer: torch.Tensor) -> torch.Tensor:
    """Each layer `(L, T)` divided by its mean over the chunk, and their mean `(T,)`."""
    return (by_layer / by_layer.mean(dim=1, keepdim=True).clamp(min=1e-20)).mean(dim=0)


def by_scores(of_chunk: Callable[[Seen], torch.Tensor], seen: Mapping[Chunk, Seen]) -> Scores:
    return {chunk: of_chunk(what) for chunk, what in seen.items()}


def deviation_and_attention(seen: Seen, layers: slice = slice(1, None)) -> torch.Tensor:
    """What `stored_deviation` ships with."""
    return relative(seen.values[layers]) * relative(seen.attention).sqrt()


def moved_keys(seen: Seen) -> torch.Tensor:
    return relative(seen.keys[1:]) * relative(seen.attention).sqrt()


@dataclass(frozen=True)
class ByScores(SelectionPolicy):
    """The share of reused tokens with the highest of these scores; tokens of other chunks never.

    `question_share` of them are chosen by the attention of the question at `layer` instead, or with `weighs` all by
    score times the root of that attention.
    """

    share: float = 0.0
    scores: Scores = field(default_factory=dict, hash=False, compare=False)
    layer: int = 0
    question_share: float = 0.0
    weighs: bool = False

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return (self.layer,) if self.layer else ()

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        reused = reused_positions(plan)
        scores = torch.cat(
            [self.scores.get(span.chunk, torch.zeros(len(span.chunk.token_ids)))[: len(span)] for span in plan]
        )
        count = share_of(len(reused), self.share)
        if not count:
            return Selection(reused[:0])
        if self.layer:
            looked_at = question_attention(context, self.layer)
            if self.weighs:
                scores = scores * (looked_at / looked_at.mean()).sqrt()
            else:
                num_asked = round(count * self.question_share)
                scores = scores.index_fill(0, looked_at.topk(num_asked).indices, torch.inf)
        return Selection(reused[scores.topk(count).indices.sort().values])


@dataclass(frozen=True)
class ByValues(SelectionPolicy):
    """The share of reused tokens whose values `(T, H_kv * D)` at a layer lie furthest from those that are reused."""

    share: float = 0.0
    fresh: torch.Tensor = field(default_factory=lambda: torch.empty(0), hash=False, compare=False)
    layer: int = 0

    def watched_layers(self, num_layers: int) -> Sequence[int]:
        return (self.layer,)

    def select(self, plan: ReusePlan, context: SelectionContext) -> Selection:
        reused = reused_positions(plan)
        moved = (self.fresh[reused] - context.reused_values(self.layer).flatten(1)).square().sum(dim=1)
        return Selection(reused[moved.topk(share_of(len(reused), self.share)).indices.sort().values])


def question_attention(context: SelectionContext, layer: int) -> torch.Tensor:
    """The attention `(T,)` that the question pays to each reused token."""
    queries, keys = context.question_queries(layer).float(), context.reused_keys(layer).float()
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    weights = torch.einsum("qkgd,tkd->kgqt", grouped, keys) / keys.shape[-1] ** 0.5
    return weights.softmax(dim=-1).sum(dim=(0, 1, 2))


class Study:
    """One model, one store of chunks computed after the model's sink, and full prefill's answers."""

    def __init__(self, model: str | None, separator: str) -> None:
        self.model = HFModel.load(find_model(model, "cpu").name, dtype="float32")
        self.separator = separator
        self.store = MemoryStore(STORE_BYTES)
        self.blender = self.new_blender(self.store)

    def new_blender(self, store: MemoryStore) -> HFBlender:
        return HFBlender(self.model, store, separator=self.separator)

    def prompt(self, messages: Sequence[Mapping[str, str]], *, asks: bool = True) -> list[int]:
        template = self.model.tokenizer.apply_chat_template
        token_ids: list[int] = template(messages, add_generation_prompt=asks, return_dict=False)
        return token_ids

    def over(self, chunks: Sequence[TextChunk]) -> list[int]:
        text = join_chunks([chunk.text for chunk in chunks], self.separator)
        return self.prompt([{"role": "user", "content": text}], asks=False)

    def probed(self, contexts: Sequence[Sequence[TextChunk]]) -> dict[Chunk, Seen]:
        Probe.found = {}
        for context in contexts:
            self.blender.score(self.over(context))
        return Probe.found

    def full(self, token_ids: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Full prefill's answer and the log-probabilities `(T, V)` along it."""
        kv = self.model.new_kv(len(token_ids) + ANSWER_TOKENS)
        logits = [self.model.prefill(kv, token_ids, lambda: False)]
        answer = [int(logits[0].argmax())]
        while len(answer) < ANSWER_TOKENS and answer[-1] not in self.model.eos_token_ids:
            logits.append(self.model.decode(kv, answer[-1]))
            answer.append(int(logits[-1].argmax()))
        return answer, torch.stack(logits).float().log_softmax(-1)

    def blended(
        self, token_ids: Sequence[int], policy: SelectionPolicy, answer: Sequence[int], blender: HFBlender | None = None
    ) -> torch.Tensor:
        """The same along full prefill's answer, after a blend that recomputes what the policy chooses."""
        blender = blender or self.blender
        kv = self.model.new_kv(len(token_ids) + ANSWER_TOKENS)
        self.model.run(blender._blend, as_token_ids(token_ids), policy, kv, None)
        first = self.model.prefill(kv, token_ids[kv.length :], lambda: False)
        rest = [self.model.run_through(kv, answer[:-1])] if len(answer) > 1 else []
        return torch.cat([first[None], *rest]).float().log_softmax(-1)

    def values_at(self, token_ids: Sequence[int], layer: int, window: int | None) -> torch.Tensor:
        """A prompt's own values `(T, H_kv * D)` at a layer of a Llama. With `window`, a token of the layers before sees
        the prompt's first tokens, and as many before itself.
        """
        positions = torch.arange(len(token_ids))
        distance = positions[:, None] - positions
        seen = distance >= 0
        if window:
            seen &= (distance < window) | (positions < WINDOW_SINK_TOKENS)
        found: list[torch.Tensor] = []

        def keep(module: object, args: object, values: torch.Tensor) -> None:
            found.append(values[0])
            raise EndForward

        hook = self.model.module.model.layers[layer].self_attn.v_proj.register_forward_hook(keep)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None, None]
        try:
            with suppress(EndForward), torch.inference_mode():
                self.model.module.model(torch.tensor([token_ids]), attention_mask=mask, use_cache=False)
        finally:
            hook.remove()
        return found[0]

    def with_values(self, values: Mapping[Chunk, torch.Tensor]) -> HFBlender:
        """Over a store whose chunks have these values `(L, T, H_kv * D)` in place of their own."""
        store = MemoryStore(STORE_BYTES)
        for chunk, own in values.items():
            kv = get(self.store, chunk)
            assert kv is not None
            store.put(chunk, torch.stack([kv[0], own]))
        return self.new_blender(store)

    def with_seams(self, token_ids: Sequence[int]) -> HFBlender:
        """Over a store in which each chunk of this prompt was computed after the one that stands before it here."""
        store = MemoryStore(STORE_BYTES)
        plan = self.model.run(self.blender._plan, as_token_ids(token_ids))
        spans = [span for span in plan if span.is_whole_chunk]
        for number, span in enumerate(spans):
            before = spans[number - 1].chunk.token_ids if number else as_token_ids([])
            store.put(span.chunk, self.model.run(self._after, span.chunk, before))
        return self.new_blender(store)

    def _after(self, chunk: Chunk, before: TokenIds) -> torch.Tensor:
        """The chunk's KV `(2, L, T, H_kv * D)` after its sink and another text, keys as after the sink alone."""
        text = as_token_ids([*chunk.sink, *before, *chunk.token_ids])
        kv = SequenceKV(self.model.kv_shape, len(text))
        own = HFPrefilledModel(self.blender._blendable, text, kv)
        own.forward(torch.arange(len(text)))
        found = kv.filled(len(chunk.sink) + len(before), len(text)).permute(1, 0, 3, 2, 4).clone()  # (2, L, T, H, D)
        here = torch.arange(len(chunk.token_ids)) + len(chunk.sink)
        for layer, rotation in enumerate(self.blender._blendable.rotations):
            if rotation is not None:
                rotation.between(here + len(before), here).apply_(found[0, layer])
        return found.flatten(3)


class Table:
    """KL and agreement of each way, over all positions of all questions."""

    def __init__(self) -> None:
        self._kl: dict[tuple[str, float], list[float]] = defaultdict(list)
        self._same: dict[tuple[str, float], list[float]] = defaultdict(list)

    def add(self, way: str, share: float, full: torch.Tensor, blended: torch.Tensor) -> None:
        self._kl[way, share].append(float((full.exp() * (full - blended)).sum(-1).mean()))
        self._same[way, share].append(float((full.argmax(-1) == blended.argmax(-1)).float().mean()))

    def lines(self) -> Iterator[str]:
        shares = sorted({share for _, share in self._kl})
        yield "| | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
        yield "|---" * (len(shares) + 1) + "|"
        for way in dict.fromkeys(way for way, _ in self._kl):
            yield f"| {way} | " + " | ".join(self._cell(way, share) for share in shares) + " |"

    def _cell(self, way: str, share: float) -> str:
        kl = torch.tensor(self._kl.get((way, share), []))
        if not len(kl):
            return ""
        same = torch.tensor(self._same[way, share])
        return f"{kl.mean():.3f} ± {kl.std() / len(kl) ** 0.5:.3f} · {100 * same.mean():.1f}"


def contexts(
    chunks: Sequence[TextChunk], size: int, *, num_probes: int, others: Sequence[TextChunk] = ()
) -> list[list[TextChunk]]:
    """Every chunk in the middle of `num_probes` contexts of `size`, at whose ends stand others, or chunks drawn."""
    found = []
    for number in range(num_probes):
        rng = random.Random(number)
        order = rng.sample(chunks, len(chunks))
        for at in range(0, len(order), size - 2):
            middle = order[at : at + size - 2]
            before, after = rng.sample(others or [chunk for chunk in chunks if chunk not in middle], 2)
            found.append([before, *middle, after])
    return found


def foreign(characters: int) -> list[TextChunk]:
    """Texts on something else: Python's documentation."""
    texts = [text for text in topics.values() if len(text) > characters]
    return [TextChunk(f"python-{number}", text[:characters]) for number, text in enumerate(texts)]


def probe_ways(study: Study, chunks: Sequence[TextChunk]) -> dict[str, dict[Chunk, Seen]]:
    """Probes of several lengths, with neighbours of the folder's and of another text, and one of a kind."""
    length = sorted(len(chunk.text) for chunk in chunks)[len(chunks) // 2]
    return {
        "7 chunks": study.probed(contexts(chunks, 7, num_probes=NUM_PROBES)),
        "3 chunks": study.probed(contexts(chunks, 3, num_probes=NUM_PROBES)),
        "12 chunks": study.probed(contexts(chunks, 12, num_probes=NUM_PROBES)),
        "3, foreign ends": study.probed(contexts(chunks, 3, num_probes=NUM_PROBES, others=foreign(length))),
        "3 chunks, one probe": study.probed(contexts(chunks, 3, num_probes=1)),
        "3, foreign ends, one probe": study.probed(contexts(chunks, 3, num_probes=1, others=foreign(length))),
    }


def score_ways(study: Study, seen: Mapping[Chunk, Seen]) -> dict[str, ByScores]:
    """Scores of the same probes made in other ways, and together with what the question looks at."""
    num_layers = study.model.kv_shape.num_layers
    halves = slice(1, num_layers // 2), slice(num_layers // 2, None)
    made: dict[str, Callable[[Seen], torch.Tensor]] = {
        "keys in place of values": moved_keys,
        "values and keys": lambda one: deviation_and_attention(one) + moved_keys(one),
        "values of the first half of the layers": lambda one: deviation_and_attention(one, halves[0]),
        "values of the second half": lambda one: deviation_and_attention(one, halves[1]),
    }
    ways = {way: ByScores(scores=by_scores(of_chunk, seen)) for way, of_chunk in made.items()}
    shipped = by_scores(deviation_and_attention, seen)
    for layer in (num_layers // 3, 2 * num_layers // 3):
        looked_at = f"the question's attention at layer {layer}"
        ways[f"half of them by {looked_at}"] = ByScores(scores=shipped, layer=layer, question_share=0.5)
        ways[f"times the root of {looked_at}"] = ByScores(scores=shipped, layer=layer, weighs=True)
    return ways


def shifted(study: Study, seen: Mapping[Chunk, Seen]) -> dict[str, HFBlender]:
    """Over chunks whose values were moved by the mean of what the probes showed (AgentKVShift, arXiv 2607.21604)."""
    by_chunk, by_token = {}, {}
    for chunk, what in seen.items():
        kv = get(study.store, chunk)
        assert kv is not None
        shift = what.in_context / what.num_probes - kv[1]
        by_chunk[chunk] = kv[1] + shift.mean(dim=1, keepdim=True)
        by_token[chunk] = kv[1] + shift
    return {
        "values moved by their chunk's mean shift": study.with_values(by_chunk),
        "values moved by each token's mean shift": study.with_values(by_token),
    }


def run(
    study: Study, questions: Sequence[EvalQuestion], chunks: Sequence[TextChunk], system: str, shares: Sequence[float]
) -> Table:
    """What was asked until Ctrl+C counts."""
    blend_module.ChunkScorer = Probe  # type: ignore[misc]
    for chunk in chunks:
        study.blender.prefill(study.over([chunk]), BlendParams("none"), 0)
    probes = probe_ways(study, chunks)
    seen = probes["7 chunks"]
    ways = {
        f"deviation √attention, probes of {name}": ByScores(scores=by_scores(deviation_and_attention, one))
        for name, one in probes.items()
    } | score_ways(study, seen)
    moved = shifted(study, seen)
    shipped = by_scores(deviation_and_attention, seen)
    table = Table()
    with suppress(KeyboardInterrupt):
        for number, question in enumerate(questions, start=1):
            print(f"{time.strftime('%X')} {number} of {len(questions)}", file=sys.stderr, flush=True)
            token_ids = study.prompt(question.messages(system, study.separator))
            compare(study, question.chunks, token_ids, ways, moved, shipped, shares, table)
    return table


def compare(
    study: Study,
    chunks: Sequence[TextChunk],
    token_ids: Sequence[int],
    ways: Mapping[str, ByScores],
    moved: Mapping[str, HFBlender],
    shipped: Scores,
    shares: Sequence[float],
    table: Table,
) -> None:
    """Of one prompt: every way, and those that look at this prompt alone."""
    answer, full = study.full(token_ids)
    orders = [random.Random(number).sample(chunks, len(chunks)) for number in range(NUM_PROBES)]
    here = by_scores(deviation_and_attention, study.probed(orders))
    online = {
        f"deviation of values, layer {CHECK_LAYER}" + (f", a window of {window} tokens" if window else ""): (
            study.model.run(study.values_at, token_ids, CHECK_LAYER, window)
        )
        for window in WINDOWS
    }
    blenders = {**moved, "chunks computed after their predecessor here": study.with_seams(token_ids)}
    for share in shares:
        chosen: dict[str, SelectionPolicy] = {"nothing": ByScores()}
        if share:
            chosen = {way: replace(policy, share=share) for way, policy in ways.items()}
            chosen |= {"probes with the same chunks, other orders": ByScores(share, here)}
            chosen |= {way: ByValues(share, values, CHECK_LAYER) for way, values in online.items()}
        for way, policy in chosen.items():
            table.add(way, share, full, study.blended(token_ids, policy, answer))
        for way, blender in blenders.items():
            table.add(way, share, full, study.blended(token_ids, ByScores(share, shipped), answer, blender))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder [default: the stack's default model]")
    parser.add_argument("--questions", type=Path, default=Path("data/questions.jsonl"))
    parser.add_argument("--num-questions", type=int, default=16)
    parser.add_argument("--ratio", default="0,0.05,0.1", help="shares of tokens, separated by commas")
    options = parser.parse_args()
    source = find_model(options.model, "cpu")
    separator = read_blend_profile(source.name).get("separator", "\n\n")
    study = Study(options.model, separator)
    loaded = load_questions(options.questions, None, options.num_questions, None, Splitter())
    shares = [float(share) for share in options.ratio.split(",")]
    try:
        print(*run(study, loaded.questions, loaded.chunks, loaded.system, shares).lines(), sep="\n")
    finally:
        study.model.close()


if __name__ == "__main__":
    main()
