"""`kvarena bench ttft`: time to first token as a client sees it, over context lengths and states of the chunk store.

In every cell all variants are asked the same prompts in turn, burst by burst; a burst is one streamed completion, or
several at once. Bursts become rows, one for each variant of a cell, and rows a table, with what to know before
believing it. `docs/benchmarks.md` says how to read the figures.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from tokenizers import Tokenizer

from kvarena.bench.console import Column, table_of
from kvarena.bench.measure import PeakMemory, Reuse, in_turn
from kvarena.bench.prompts import Cell, Prompts, Vocabulary, Workload
from kvarena.bench.results import DIGITS, Row, median_interval, ratio_spread, shown_path, spread
from kvarena.bench.variants import Variant, is_blend, reads_scores
from kvarena.client import COMPLETIONS, Client, ClientError, ServerInfo
from kvarena.documents import FALLBACK_SEPARATOR, load_chunks, without_separators
from kvarena.model import load_tokenizer
from kvarena.panels.panel import REFERENCE, variant_label
from kvarena.panels.speed import UNKNOWN
from kvarena.splitting import find_splitter


@dataclass(frozen=True)
class Timed:
    """One answer. Times are in seconds of this process's clock. `reuse` is None where the server tells nothing.

    `report` is a blend's request report.
    """

    sent_s: float
    first_s: float
    ended_s: float
    num_answer_tokens: int
    reuse: Reuse | None = None
    report: Mapping[str, Any] | None = None

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.first_s - self.sent_s)

    @property
    def e2e_ms(self) -> float:
        return 1000 * (self.ended_s - self.sent_s)

    @property
    def tpot_ms(self) -> float | None:
        """Time for each token after the first; None for an answer of one."""
        more = self.num_answer_tokens - 1
        return 1000 * (self.ended_s - self.first_s) / more if more > 0 else None


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once, in the order of their prompts; one that failed is its reason.

    Memory is of the server and all its processes, before the burst and at its highest; None where it isn't known.
    """

    outcomes: Sequence[Timed | str]
    before_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def answered(self) -> list[Timed]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Timed)]

    @property
    def requests_per_s(self) -> float | None:
        """From the first request's sending to the last one's end; None when not all were answered."""
        answered = self.answered
        if len(answered) < len(self.outcomes):
            return None
        return len(answered) / (max(one.ended_s for one in answered) - min(one.sent_s for one in answered))


class Contender:
    """`pid` is the server's process, where it runs here, and `options` are those it was started with.

    `is_told`: what its store holds is known beforehand.
    """

    def __init__(
        self,
        name: str,
        client: Client,
        server: ServerInfo,
        pid: int | None = None,
        options: Mapping[str, str] | None = None,
        is_target: bool = False,
    ) -> None:
        self.name, self.server = name, server
        self._client, self._options = client, options
        self.is_blend = is_blend(server)
        self.is_told = self.is_blend or not is_target
        self._extras: dict[str, Any] = {"ignore_eos": True} if _can_tokenize(client, server) else {}
        self._memory = PeakMemory(pid, with_children=True) if pid else None

    def ask_at_once(
        self, prompts: Sequence[Sequence[int]], variant: Variant, max_tokens: int, salt: str = "", store: str = ""
    ) -> Burst:
        """`salt` keeps a blend's chunks apart from those of other salts. `store` is its parameter of that name."""

        def ask(prompt: Sequence[int]) -> Timed | str:
            try:
                return self._ask(prompt, variant, max_tokens, salt, store)
            except ClientError as error:
                return error.reason

        if self._memory:
            self._memory.start()
        pool = ThreadPoolExecutor(len(prompts))
        try:
            outcomes = list(pool.map(ask, prompts))
        finally:
            pool.shutdown(wait=False)  # an interrupt needn't wait for answers
        if not self._memory:
            return Burst(outcomes)
        return Burst(outcomes, self._memory.before_bytes, self._memory.peak_bytes())

    def describe(self) -> dict[str, object]:
        """As it goes into the result file's settings."""
        return {
            "url": self._client.url,
            "model": self.server.model,
            "offer": self.server.offer,
            "options": self._options,
        }

    def close(self) -> None:
        self._client.close()

    def _ask(self, prompt: Sequence[int], variant: Variant, max_tokens: int, salt: str, store: str) -> Timed:
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            **self._extras,
        }
        if salt:
            body["cache_salt"] = salt
        if chosen := variant.choices | ({"store": store} if store else {}):
            body["kv_transfer_params"] = {"kvarena": chosen}
        answer = self._client.stream(COMPLETIONS, body)
        report = self._client.report(answer.request_id) if self.is_blend else None
        num_tokens = answer.usage.num_output_tokens or len(answer.tokens)
        reuse, first_s = Reuse.read(report, answer.usage), answer.tokens[0].time_s
        return Timed(answer.sent_s, first_s, answer.ended_s, num_tokens, reuse, report)


def _can_tokenize(client: Client, server: ServerInfo) -> bool:
    """Whether it has `/tokenize`, as vLLM, SGLang and our own engines have: these take `ignore_eos` too."""
    try:
        client.token_ids({"model": server.model, "prompt": "a"})
    except ClientError:
        return False
    return True


BLEND_MS = "blend_ms"
NOT_STAGES = (BLEND_MS, "max_ttft_ms")


@dataclass(frozen=True)
class Measured:
    """`is_told`: what the contender's store holds is known, from its kind or because it was started for this."""

    variant: Variant
    is_told: bool
    bursts: Sequence[Burst]

    @property
    def outcomes(self) -> list[Timed | str]:
        return [outcome for burst in self.bursts for outcome in burst.outcomes]

    @property
    def answered(self) -> list[Timed]:
        return [one for burst in self.bursts for one in burst.answered]


def cell_rows(cell: Cell, measured: Sequence[Measured], num_known_chunks: int = 0) -> list[Row]:
    """`num_known_chunks` of each prompt ought to be in a blend's store."""
    plain = next((one for one in measured if one.variant.contender == REFERENCE), None)
    return [{**_row(cell, one, plain), "num_known_chunks": num_known_chunks} for one in measured]


def _row(cell: Cell, one: Measured, plain: Measured | None) -> Row:
    answered = one.answered
    failures = [outcome for outcome in one.outcomes if isinstance(outcome, str)]
    rates = [rate for burst in one.bursts if (rate := burst.requests_per_s)]
    speedups = list(_ttft_speedups(one, plain)) if plain else []
    return {
        **one.variant.to_json(),
        "context_tokens": cell.context_tokens,
        "store": cell.state if one.is_told else UNKNOWN,
        "prompts": cell.state,
        "concurrency": cell.concurrency,
        "num_requests": len(one.outcomes),
        "num_failed": len(failures),
        "failure": failures[0] if failures else None,
        "ttft_ms": spread([one.ttft_ms for one in answered]),
        "tpot_ms": spread([tpot for one in answered if (tpot := one.tpot_ms) is not None]),
        "e2e_ms": spread([one.e2e_ms for one in answered]),
        "num_pairs": len(speedups),
        "speedup_vs_plain": ratio_spread(speedups),
        "speedup_interval": median_interval(speedups),
        "requests_per_s": ratio_spread(rates),
        "throughput_vs_plain": ratio_spread(list(_throughput_ratios(one, plain))) if plain else None,
        **_token_shares(answered),
        "stages_ms": _stages(answered),
        "idle_rss_bytes": one.bursts[0].before_bytes if one.bursts else None,
        "peak_rss_bytes": max((burst.peak_bytes for burst in one.bursts if burst.peak_bytes), default=None),
    }


def _ttft_speedups(one: Measured, plain: Measured) -> Iterator[float]:
    """Of the first token, on each prompt that both answered."""
    for mine, other in zip(one.outcomes, plain.outcomes, strict=True):
        if isinstance(mine, Timed) and isinstance(other, Timed):
            yield other.ttft_ms / mine.ttft_ms


def _throughput_ratios(one: Measured, plain: Measured) -> Iterator[float]:
    """Of the requests answered per second, burst by burst."""
    for mine, other in zip(one.bursts, plain.bursts, strict=True):
        if mine.requests_per_s and other.requests_per_s:
            yield mine.requests_per_s / other.requests_per_s


def _token_shares(answered: Sequence[Timed]) -> dict[str, Any]:
    """Of all prompts' tokens; the three shares add up to 1. None where the server tells nothing."""
    known = [one.reuse for one in answered if one.reuse]
    num_tokens = sum(reuse.num_prompt_tokens for reuse in known)
    reused = sum(reuse.num_reused_tokens for reuse in known)
    recomputed = sum(reuse.num_recomputed_tokens for reuse in known)
    counts = {"reused": reused, "recomputed": recomputed, "computed": num_tokens - reused - recomputed}
    reports = [one.report for one in answered if one.report]
    return {
        "num_prompt_tokens": round(num_tokens / len(known)) if known else None,
        **{f"{name}_ratio": round(count / num_tokens, DIGITS) if known else None for name, count in counts.items()},
        "num_store_hits": sum(report["store_hits"] for report in reports) if reports else None,
        "num_store_misses": sum(report["store_misses"] for report in reports) if reports else None,
    }


def _stages(answered: Sequence[Timed]) -> dict[str, float] | None:
    """Medians of a request's parts: those of the blend by its own report, what was before the first token beside
    them (waiting included), and after it."""
    split = [_split(one) for one in answered]
    names = dict.fromkeys(name for stages in split for name in stages)
    return {name: round(float(np.median([stages.get(name, 0.0) for stages in split])), 3) for name in names} or None


def _split(one: Timed) -> dict[str, float]:
    report = one.report or {}
    blend = {name: float(ms) for name, ms in report.items() if name.endswith("_ms") and name not in NOT_STAGES}
    stages = {name.removesuffix("_ms"): ms for name, ms in blend.items()}
    outside = max(0.0, one.ttft_ms - float(report.get(BLEND_MS, 0.0)))
    return stages | {"prefill": outside, "decode": one.e2e_ms - one.ttft_ms}


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """A section for each cell."""
    title = "Time to first token (TTFT), medians; speedup over plain, with the least and greatest of pairs"
    figures: dict[str, Column] = {
        "TTFT ms": "{ttft_ms[median]:,.0f}",
        "speedup": "{speedup_vs_plain[median]:.2f} ({speedup_vs_plain[low]:.2f}-{speedup_vs_plain[high]:.2f})",
        "req/s": "{requests_per_s[median]:.2f}",
        "reused": "{reused_ratio:.0%}",
        "redone": "{recomputed_ratio:.0%}",
        "MiB": lambda row: "-" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 2**20:,.0f}",
    }
    layout: dict[str, Any] = {"min_width": 14, "padding": (0, 1, 0, 0), "pad_edge": False}
    console.print(table_of(title, rows, {"contender": variant_label}, figures, section=_cell, **layout))


def show_warnings(rows: Sequence[Row], console: Console) -> None:
    """Requests that failed, and stores that had lost what they should have known."""
    for row in rows:
        if row["num_failed"]:
            failed = f"{row['num_failed']} of {row['num_requests']} requests failed"
            reason = escape(row["failure"])
            console.print(f"[red]{variant_label(row)}, {row['context_tokens']:,} tokens: {failed}[/red]: {reason}")
    lost = [row for row in rows if _has_lost_chunks(row)]
    if lost:
        first = f"{variant_label(lost[0])}, {lost[0]['store']}, {lost[0]['context_tokens']:,} tokens"
        console.print(
            f"[yellow]Known chunks were not in the store any more in {len(lost)} rows[/yellow], the first: {first}. "
            "Give the store more memory (--store-gb).",
            soft_wrap=True,
        )


def _has_lost_chunks(row: Row) -> bool:
    if row["num_store_hits"] is None or row["policy"] is None:
        return False
    return bool(row["num_store_hits"] < row["num_known_chunks"] * (row["num_requests"] - row["num_failed"]))


def _cell(row: Row) -> str:
    chunks = "no chunks" if row["prompts"] == "none" else row["prompts"]
    return f"{row['context_tokens']:,} tokens, {chunks}, {row['concurrency']} at once"


class Bench:
    """Every blend is asked for all of `policies`, whichever contender they name; `separator` goes between chunks.

    Without a separator the blend's is taken, without a tokenizer the first server's. Known chunks are cut from the
    documents of `data`, where it is given. Raises `ValueError` and `OSError` for a tokenizer that isn't there or that
    has no words, and for a folder without documents.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        policies: Sequence[Variant],
        workload: Workload,
        separator: str | None = None,
        tokenizer: str | None = None,
        data: Path | None = None,
    ) -> None:
        known = [separator, *(contender.server.separator for contender in contenders), FALLBACK_SEPARATOR]
        self.separator = next(one for one in known if one is not None)
        name = tokenizer or contenders[0].server.root or contenders[0].server.model
        found = load_tokenizer(name)
        self.vocabulary = Vocabulary.of(found, self.separator)
        self.policies = {
            blend.name: [replace(one, contender=blend.name) for one in policies]
            for blend in contenders
            if blend.is_blend
        }
        self._contenders, self._workload = {one.name: one for one in contenders}, workload
        self._data, self._text = data, _document_ids(data, found, name, self.separator) if data else []

    @property
    def num_steps(self) -> int:
        return self._workload.repeats * sum(len(self.variants(cell.state)) for cell in self._workload.cells)

    def settings(self) -> dict[str, Any]:
        return {
            "separator": self.separator,
            "policies": {name: [variant.choices for variant in variants] for name, variants in self.policies.items()},
            "contenders": {name: contender.describe() for name, contender in self._contenders.items()},
            "data": shown_path(self._data) if self._data else None,
            "num_document_tokens": len(self._text) if self._data else None,
            **vars(self._workload),
        }

    def variants(self, state: str) -> list[Variant]:
        """Who is compared. Without a chunk in the prompt a blend has nothing to choose."""
        variants: list[Variant] = []
        for name in self._contenders:
            blends = self.policies.get(name) if state != "none" else None
            variants += blends or [Variant(name)]
        return variants

    def run(self, on_step: Callable[[], None]) -> Iterator[list[Row]]:
        """The rows of one cell after the other; `on_step` is called after each burst. Failures are counted in them.

        An interrupt ends it after the rows of what was measured of its cell, as far as all were asked.
        """
        rng = random.Random(self._workload.seed)
        for context_tokens in self._workload.context_tokens:
            prompts = Prompts(self.vocabulary, self._workload, context_tokens, rng, self._text)
            self._warm_up(prompts)
            for cell in (cell for cell in self._workload.cells if cell.context_tokens == context_tokens):
                bursts: dict[Variant, list[Burst]] = {variant: [] for variant in self.variants(cell.state)}
                try:
                    self._measure(cell, prompts, bursts, on_step)
                except KeyboardInterrupt:
                    if num_whole := min(map(len, bursts.values())):
                        whole = {variant: found[:num_whole] for variant, found in bursts.items()}
                        yield self._rows(cell, prompts, whole)
                    raise
                yield self._rows(cell, prompts, bursts)

    def _warm_up(self, prompts: Prompts) -> None:
        """Every variant meets a prompt of this length once, in the first state it is measured in."""
        if "warm" in self._workload.states:
            self._teach(prompts, [(name, "") for name in self.policies])
        first_states: dict[Variant, str] = {}
        for cell in self._workload.cells:
            for variant in self.variants(cell.state):
                first_states.setdefault(variant, cell.state)
        for variant, state in first_states.items():
            contender, prompt = self._contenders[variant.contender], prompts.draw(state)
            contender.ask_at_once([prompt], variant, self._workload.max_new_tokens)

    def _teach(self, prompts: Prompts, places: Iterable[tuple[str, str]]) -> None:
        """Makes these blends store the known chunks, for these salts."""
        for name, salt in places:
            self._contenders[name].ask_at_once([prompts.teach()], Variant(name, "none"), 1, salt)
            if any(reads_scores(own.policy) for own in self.policies[name]):
                for prompt in prompts.teach_scores():
                    self._contenders[name].ask_at_once([prompt], Variant(name, "none"), 1, salt, "scores")

    def _rows(self, cell: Cell, prompts: Prompts, bursts: Mapping[Variant, Sequence[Burst]]) -> list[Row]:
        measured = [Measured(one, self._contenders[one.contender].is_told, found) for one, found in bursts.items()]
        return cell_rows(cell, measured, num_known_chunks=prompts.num_known(cell.state))

    def _measure(
        self, cell: Cell, prompts: Prompts, bursts: Mapping[Variant, list[Burst]], on_step: Callable[[], None]
    ) -> None:
        """Appends to the `bursts` of each variant."""
        variants = list(bursts)
        salts = {variant: _salt(cell, variant) for variant in variants}
        if cell.state == "half":
            self._teach(prompts, [(variant.contender, salt) for variant, salt in salts.items() if salt])
        for repeat in range(self._workload.repeats):
            batch = [prompts.draw(cell.state) for _ in range(cell.concurrency)]
            for variant in in_turn(variants, repeat):
                contender = self._contenders[variant.contender]
                burst = contender.ask_at_once(batch, variant, self._workload.max_new_tokens, salts[variant])
                bursts[variant].append(burst)
                on_step()


def _document_ids(folder: Path, tokenizer: Tokenizer, tokenizer_name: str, separator: str) -> list[int]:
    """All documents' tokens. Raises `ValueError` where the folder has none."""
    texts = [chunk.text for chunk in load_chunks(folder, find_splitter(tokenizer_name))]
    whole = "\n\n".join(without_separators(text, separator) for text in texts)
    ids: list[int] = tokenizer.encode(whole, add_special_tokens=False).ids
    if not ids:
        raise ValueError(f"{folder} has no documents")
    return ids


def _salt(cell: Cell, variant: Variant) -> str:
    """Policies of one blend are asked the same new chunks, which the first one would make known to the others.

    vLLM allows few characters in a salt, and a label has others.
    """
    brings_chunks = variant.policy is not None and cell.state in ("half", "cold")
    return hashlib.sha256(f"{variant.label} {cell.context_tokens}".encode()).hexdigest() if brings_chunks else ""
