"""The measurement: for every cell, every variant is asked the same prompts in turn, burst by burst.

Bursts become rows, one for each variant of a cell, and rows a table in a terminal, with what to know before
believing them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column
from tokenizers import Tokenizer

from kvarena.bench.console import new_table
from kvarena.bench.results import DIGITS, REFERENCE, Row, median_interval, ratio_spread, shown_path, spread
from kvarena.bench.ttft.client import Burst, Contender, Timed
from kvarena.bench.ttft.workload import Cell, Prompts, Vocabulary, Workload
from kvarena.bench.variants import Variant, reads_scores
from kvarena.documents import FALLBACK_SEPARATOR, load_chunks, without_separators
from kvarena.model import load_tokenizer
from kvarena.splitting import find_splitter

UNKNOWN = "unknown"
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


def cell_rows(cell: Cell, measured: Sequence[Measured], reference: str, num_known_chunks: int = 0) -> list[Row]:
    """`reference` names the contender that the others are compared with, prompt by prompt.

    `num_known_chunks` of each prompt ought to be in a blend's store.
    """
    plain = next((one for one in measured if one.variant.contender == reference), None)
    rows = [_row(cell, one, plain) for one in measured]
    return [{**row, "num_known_chunks": num_known_chunks} for row in rows]


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
        "ttft_ms": _spread(one.ttft_ms for one in answered),
        "tpot_ms": _spread(tpot for one in answered if (tpot := one.tpot_ms) is not None),
        "e2e_ms": _spread(one.e2e_ms for one in answered),
        "num_pairs": len(speedups),
        "speedup_vs_plain": _ratios(speedups),
        "speedup_interval": median_interval(speedups),
        "requests_per_s": ratio_spread(rates) if rates else None,
        "throughput_vs_plain": _ratios(_throughput_ratios(one, plain)) if plain else None,
        **_token_shares(answered),
        "stages_ms": _stages(answered),
        "idle_rss_bytes": one.bursts[0].before_bytes if one.bursts else None,
        "peak_rss_bytes": max((burst.peak_bytes for burst in one.bursts if burst.peak_bytes), default=None),
    }


def _ttft_speedups(one: Measured, plain: Measured) -> Iterator[float]:
    """How many times sooner the first token came, on each prompt that both answered."""
    for mine, other in zip(one.outcomes, plain.outcomes, strict=True):
        if isinstance(mine, Timed) and isinstance(other, Timed):
            yield other.ttft_ms / mine.ttft_ms


def _throughput_ratios(one: Measured, plain: Measured) -> Iterator[float]:
    """How many times more requests were answered in a second, burst by burst."""
    for mine, other in zip(one.bursts, plain.bursts, strict=True):
        if mine.requests_per_s and other.requests_per_s:
            yield mine.requests_per_s / other.requests_per_s


def _ratios(values: Iterable[float]) -> dict[str, float] | None:
    found = list(values)
    return ratio_spread(found) if found else None


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    found = list(values)
    return spread(found) if found else None


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
    return {name: round(float(np.median([s.get(name, 0.0) for s in split])), 3) for name in names} or None


def _split(one: Timed) -> dict[str, float]:
    report = one.report or {}
    blend = {name: float(ms) for name, ms in report.items() if name.endswith("_ms") and name not in NOT_STAGES}
    stages = {name.removesuffix("_ms"): ms for name, ms in blend.items()}
    outside = max(0.0, one.ttft_ms - float(report.get(BLEND_MS, 0.0)))
    return stages | {"prefill": outside, "decode": one.e2e_ms - one.ttft_ms}


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """A section for each cell."""
    title = "Time to first token (TTFT), medians; speedup over plain, with the least and greatest of pairs"
    figures = ("TTFT ms", "speedup", "req/s", "reused", "redone", "MiB")
    table = new_table(title, Column("contender"), figures=figures, padding=(0, 1, 0, 0), pad_edge=False)
    for index, row in enumerate(rows):
        if not index or _cell(row) != _cell(rows[index - 1]):
            table.add_section()
            table.add_row(f"[bold]{_cell(row)}")
        table.add_row(
            Variant.of_row(row).label,
            _figure(row["ttft_ms"], "median", "{:,.0f}"),
            _ratio(row["speedup_vs_plain"]),
            _figure(row["requests_per_s"], "median", "{:.2f}"),
            *(_share(row[f"{name}_ratio"]) for name in ("reused", "recomputed")),
            "-" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 2**20:,.0f}",
        )
    console.print(table)


def show_warnings(rows: Sequence[Row], console: Console) -> None:
    """Requests that failed, and stores that had lost what they should have known."""
    for row in rows:
        if row["num_failed"]:
            failed = f"{row['num_failed']} of {row['num_requests']} requests failed"
            reason = escape(row["failure"])
            console.print(
                f"[red]{Variant.of_row(row).label}, {row['context_tokens']:,} tokens: {failed}[/red]: {reason}"
            )
    lost = [row for row in rows if _has_lost_chunks(row)]
    if lost:
        first = f"{Variant.of_row(lost[0]).label}, {lost[0]['store']}, {lost[0]['context_tokens']:,} tokens"
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


def _figure(figures: Mapping[str, float] | None, name: str, form: str) -> str:
    return form.format(figures[name]) if figures else "-"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


@dataclass(frozen=True)
class Bench:
    """`policies` are what every blend is asked for, `separator` goes between chunks. Known chunks are cut from `text`,
    the documents of `data`, where there is one.
    """

    contenders: Mapping[str, Contender]
    policies: Mapping[str, Sequence[Variant]]
    workload: Workload
    separator: str
    vocabulary: Vocabulary
    data: Path | None = None
    text: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        contenders: Sequence[Contender],
        policies: Sequence[Variant],
        workload: Workload,
        separator: str | None,
        tokenizer: str | None,
        data: Path | None = None,
    ) -> Bench:
        """Every blend is asked for all of `policies`, whichever contender they name.

        Without a separator the blend's is taken, without a tokenizer the first server's. Raises `ValueError` and
        `OSError` for a tokenizer that isn't there or that has no words, and for a folder without documents.
        """
        known = [separator, *(contender.server.separator for contender in contenders), FALLBACK_SEPARATOR]
        chosen = next(one for one in known if one is not None)
        name = tokenizer or contenders[0].server.root or contenders[0].server.model
        found = load_tokenizer(name)
        vocabulary = Vocabulary.of(found, chosen)
        text = _document_ids(data, found, name, chosen) if data else ()
        blends = {b.name: [replace(one, contender=b.name) for one in policies] for b in contenders if b.is_blend}
        return cls({one.name: one for one in contenders}, blends, workload, chosen, vocabulary, data, text)

    @property
    def num_steps(self) -> int:
        return self.workload.repeats * sum(len(self.variants(cell.state)) for cell in self.workload.cells)

    def settings(self) -> dict[str, Any]:
        """As they go into the result file."""
        return {
            "separator": self.separator,
            "policies": {name: [variant.choices for variant in variants] for name, variants in self.policies.items()},
            "contenders": {name: contender.describe() for name, contender in self.contenders.items()},
            "data": shown_path(self.data) if self.data else None,
            "num_document_tokens": len(self.text) if self.data else None,
            **vars(self.workload),
        }

    def variants(self, state: str) -> list[Variant]:
        """Who is compared. With no chunk in the prompt a blend has nothing to choose."""
        variants: list[Variant] = []
        for name in self.contenders:
            blends = self.policies.get(name) if state != "none" else None
            variants += blends or [Variant(name)]
        return variants

    def run(self, on_step: Callable[[], None]) -> Iterator[list[Row]]:
        """The rows of one cell after the other; `on_step` is called after each burst. Failures are counted in them.

        An interrupt ends it after the rows of what was measured of its cell, as far as all were asked.
        """
        rng = random.Random(self.workload.seed)
        for context_tokens in self.workload.context_tokens:
            prompts = Prompts(self.vocabulary, self.workload, context_tokens, rng, self.text)
            self._warm_up(prompts)
            for cell in (cell for cell in self.workload.cells if cell.context_tokens == context_tokens):
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
        if "warm" in self.workload.states:
            self._teach(prompts, [(name, "") for name in self.policies])
        first_states: dict[Variant, str] = {}
        for cell in self.workload.cells:
            for variant in self.variants(cell.state):
                first_states.setdefault(variant, cell.state)
        for variant, state in first_states.items():
            self.contenders[variant.contender].ask_at_once([prompts.draw(state)], variant, self.workload.max_new_tokens)

    def _teach(self, prompts: Prompts, places: Iterable[tuple[str, str]]) -> None:
        """Has the known chunks stored by these blends, for these salts."""
        for name, salt in places:
            self.contenders[name].ask_at_once([prompts.teach()], Variant(name, "none"), 1, salt)
            if any(reads_scores(own.policy) for own in self.policies[name]):
                for prompt in prompts.teach_scores():
                    self.contenders[name].ask_at_once([prompt], Variant(name, "none"), 1, salt, "scores")

    def _rows(self, cell: Cell, prompts: Prompts, bursts: Mapping[Variant, Sequence[Burst]]) -> list[Row]:
        measured = [Measured(one, self.contenders[one.contender].is_told, found) for one, found in bursts.items()]
        return cell_rows(cell, measured, REFERENCE, num_known_chunks=prompts.num_known(cell.state))

    def _measure(
        self, cell: Cell, prompts: Prompts, bursts: Mapping[Variant, list[Burst]], on_step: Callable[[], None]
    ) -> None:
        """Appends to the `bursts` of each variant."""
        variants = list(bursts)
        salts = {variant: _salt(cell, variant) for variant in variants}
        if cell.state == "half":
            self._teach(prompts, [(variant.contender, salt) for variant, salt in salts.items() if salt])
        for repeat in range(self.workload.repeats):
            batch = [prompts.draw(cell.state) for _ in range(cell.concurrency)]
            first = repeat % len(variants)
            for variant in [*variants[first:], *variants[:first]]:
                contender = self.contenders[variant.contender]
                burst = contender.ask_at_once(batch, variant, self.workload.max_new_tokens, salts[variant])
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
