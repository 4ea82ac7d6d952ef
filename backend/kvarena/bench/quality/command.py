"""`kvarena eval`: reads the command line, shows progress, prints a table, saves the result file and its plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import decimals, explained, integers, progress

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.quality.answers import Answerer
    from kvarena.bench.quality.asking import Attempt
    from kvarena.bench.quality.questions import Exam
    from kvarena.bench.quality.setups import Setup
    from kvarena.bench.results import Row

DEFAULT_POLICY = "kv_deviation"
FALLBACK_SEPARATOR = "\n\n"
INTERRUPTED = 130


def evaluate(
    contender: Annotated[
        list[str] | None,
        typer.Option(help="A contender of the running stack, or name=address; repeatable. [default: all that run]"),
    ] = None,
    engine: Annotated[str, typer.Option(help="http: servers; hf: plain and blend in this process.")] = "http",
    model: Annotated[
        str | None, typer.Option(help="With --engine hf: a local folder or a hub name. [default: the demo model]")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="What a blend recomputes; repeatable. [default: kv_deviation]")
    ] = None,
    ratio: Annotated[str, typer.Option(help="Recomputed shares, separated by commas.")] = "0,0.05,0.1,0.15,0.3,1",
    check_layer: Annotated[
        str | None, typer.Option(help="Check layers of kv_deviation, separated by commas. [default: the model's]")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL with question, answers, optional chunks. [default: the town's]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the .txt and .md chunks. [default: where the questions are]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many, always the same.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between chunks. [default: the blend's or the model's]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="An answer that is longer counts as unparsed.")] = 48,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one answer of a server.")] = 120.0,
    logprobs: Annotated[bool, typer.Option(help="Compare the first tokens' probabilities.")] = True,
    warm: Annotated[bool, typer.Option(help="Have all chunks in the chunk cache before the first question.")] = True,
    store_gb: Annotated[float, typer.Option(min=0, help="With --engine hf: memory for chunks, in GiB.")] = 2.0,
    output: Annotated[Path, typer.Option(help="The result file; the plot goes beside it.")] = Path("results/eval.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Ask contenders questions with gold answers: how good, how close to full prefill, how soon.

    Exit status: 0 all answered, 1 an error or answers that failed, 130 interrupted; what came in until then is saved.
    """
    from rich.console import Console

    from kvarena.bench.quality import plot
    from kvarena.bench.quality.questions import load_exam
    from kvarena.bench.quality.rows import Sheet
    from kvarena.bench.quality.setups import find_reference
    from kvarena.bench.results import load_results, save_results
    from kvarena.stack.home import project_root

    console = Console(stderr=as_json)
    path = questions or (data or project_root() / "data") / "questions.jsonl"
    with explained():
        exam = load_exam(path, data, limit)
        ratios, layers = decimals(ratio), integers(check_layer) if check_layer else ()
        with console.status("Looking for the contenders ..."):
            answerers = _contenders(engine, contender or [], model, separator, timeout_s, logprobs, store_gb)
        setups = _setups(answerers.values(), policy or [DEFAULT_POLICY], ratios, layers)
        between = _separator(separator, answerers.values())
        if warm:
            _warm(answerers.values(), exam, between, console)
        attempts, is_interrupted = _ask(exam, setups, answerers, between, max_tokens, console)
    for answerer in answerers.values():
        answerer.close()
    reference = find_reference(setups)
    settings = {
        "benchmark": "eval",
        "engine": engine,
        "questions": str(path),
        "num_questions": len(exam.questions),
        "is_interrupted": is_interrupted,
        "reference": reference.label if reference else None,
        "separator": between,
        "max_tokens": max_tokens,
        "contenders": {name: answerer.describe() for name, answerer in answerers.items()},
    }
    sheet = Sheet(exam, attempts, reference)
    rows = sheet.rows()
    asked = [question.to_json() for question in exam.questions]
    save_results(output, settings, rows, questions=asked, answers=sheet.answers())
    image = output.with_suffix(".png")
    if has_answers := any(row["exact_match"] for row in rows):
        plot.plot(output, image)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        _show(rows, exam.kinds, console)
        console.print(f"Figures are in {output}{f', the plot in {image}' if has_answers else ''}.", soft_wrap=True)
    _exit(attempts, is_interrupted, console)


def _contenders(
    engine: str,
    wanted: Sequence[str],
    model: str | None,
    separator: str | None,
    timeout_s: float,
    has_logprobs: bool,
    store_gb: float,
) -> dict[str, Answerer]:
    from kvarena.bench.quality import contenders

    if engine == "hf":
        return contenders.engines(wanted, model, separator, store_gb)
    if engine != "http":
        raise ValueError(f"engine is {engine!r}; it is http or hf")
    if model:
        raise ValueError("servers have a model already; --model goes with --engine hf")
    return contenders.servers(wanted, timeout_s, has_logprobs)


def _setups(
    answerers: Iterable[Answerer], policies: Sequence[str], ratios: Sequence[float], layers: Sequence[int]
) -> list[Setup]:
    from kvarena.bench.quality.setups import Setup, blend_setups

    setups: list[Setup] = []
    for answerer in answerers:
        blends = blend_setups(answerer.name, policies, ratios, layers) if answerer.is_blend else None
        setups += blends or [Setup(answerer.name)]
    return setups


def _separator(given: str | None, answerers: Iterable[Answerer]) -> str:
    """Every contender gets the same prompts, cut where the blend cuts them."""
    known = [answerer.separator for answerer in sorted(answerers, key=lambda one: not one.is_blend)]
    return next((separator for separator in [given, *known] if separator is not None), FALLBACK_SEPARATOR)


def _warm(answerers: Iterable[Answerer], exam: Exam, separator: str, console: Console) -> None:
    from kvarena.bench.quality.answers import NoAnswer

    blends = [answerer for answerer in answerers if answerer.is_blend]
    with progress(len(blends) * len(exam.chunks), console, "warming") as advance:
        for answerer in blends:
            try:
                answerer.warm(exam.chunks, separator, advance)
            except NoAnswer as error:
                raise ValueError(f"{answerer.name}: {error}") from error


def _ask(
    exam: Exam,
    setups: Sequence[Setup],
    answerers: Mapping[str, Answerer],
    separator: str,
    max_tokens: int,
    console: Console,
) -> tuple[list[Attempt], bool]:
    """What came of it, and whether it was interrupted."""
    from kvarena.bench.quality.asking import ask_all

    attempts: list[Attempt] = []
    with progress(len(setups) * len(exam.questions), console, "asking") as advance:

        def on_answer(attempt: Attempt) -> None:
            attempts.append(attempt)
            advance()

        try:
            ask_all(exam, setups, answerers, separator, max_tokens, on_answer)
        except KeyboardInterrupt:
            return attempts, True
    return attempts, False


def _exit(attempts: Sequence[Attempt], is_interrupted: bool, console: Console) -> None:
    failed = [attempt for attempt in attempts if attempt.outcome == "failed"]
    if failed:
        console.print(f"[red]{len(failed)} answers failed[/red], the first: {failed[0].reason}", soft_wrap=True)
    if is_interrupted:
        console.print("Interrupted: the figures are of the questions until then.")
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


def _show(rows: Sequence[Row], kinds: Sequence[str], console: Console) -> None:
    """Two narrow tables: exact match over all questions and by kind; then the other figures, over all."""
    from rich import box
    from rich.table import Table

    from kvarena.bench.quality.rows import ALL_KINDS

    shown = kinds if len(kinds) > 1 else []
    troubles = [name for name in ("unparsed", "failed") if any(row[f"num_{name}"] for row in rows)]
    right = Table(title="Exact match (%), 95 % intervals", box=box.SIMPLE_HEAD, collapse_padding=True)
    other = Table(title="Closeness to full prefill, speed, trouble", box=box.SIMPLE_HEAD, collapse_padding=True)
    for table, names in (
        (right, ("all", "interval", *shown)),
        (other, ("recomputed", "reused", "F1", "same", "KL", "TTFT ms", *troubles)),
    ):
        table.add_column("contender", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right")
    for row in rows:
        if row["kind"] != ALL_KINDS:
            continue
        by_kind = {one["kind"]: one for one in rows if _label(one) == _label(row)}
        exact = row["exact_match"]
        between = f"{100 * exact['low']:.0f}-{100 * exact['high']:.0f}" if exact else "-"
        right.add_row(_label(row), _mean(exact), between, *(_mean(by_kind[kind]["exact_match"]) for kind in shown))
        other.add_row(
            _label(row),
            *("-" if row[name] is None else f"{row[name]:.0%}" for name in ("recomputed_ratio", "reused_ratio")),
            _mean(row["f1"]),
            _mean(row["agreement"]),
            f"{row['first_token_kl']['mean']:.3f}" if row["first_token_kl"] else "-",
            f"{row['ttft_ms']['median']:,.0f}" if row["ttft_ms"] else "-",
            *(str(row[f"num_{name}"]) for name in troubles),
        )
    console.print(right)
    console.print(other)


def _label(row: Row) -> str:
    from kvarena.bench.quality.setups import Setup

    return Setup(row["contender"], row["policy"], row["ratio"], row["check_layer"]).label


def _mean(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['mean']:.1f}" if interval else "-"
