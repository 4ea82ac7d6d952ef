"""`kvarena eval`: reads the command line, shows progress, prints a table, saves the result file and its plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import decimals, explained, integers

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.quality.asking import Attempt

DEFAULT_POLICY = "kv_deviation"
INTERRUPTED = 130


def evaluate(
    contender: Annotated[
        list[str] | None,
        typer.Option(help="A contender of the running stack, or name=address; repeatable. [default: all that run]"),
    ] = None,
    engine: Annotated[str, typer.Option(help="http: servers; hf: plain and blend in this process.")] = "http",
    model: Annotated[
        str | None, typer.Option(help="With --engine hf: a local folder or a hub name. [default: the town model]")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="What a blend recomputes, such as kv_deviation,deviation=values; repeatable. [default: kv_deviation]"
        ),
    ] = None,
    ratio: Annotated[str, typer.Option(help="Recomputed shares, separated by commas.")] = "0,0.05,0.1,0.15,0.3",
    check_layer: Annotated[
        str | None, typer.Option(help="Check layers of kv_deviation, separated by commas. [default: the model's]")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL with question, answers, optional chunks. [default: the documents']")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the .txt and .md chunks. [default: where the questions are]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many, always the same.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Draw other contexts: each question's `needs` among other chunks. [default: the file's own]"),
    ] = None,
    num_chunks: Annotated[
        int | None, typer.Option(min=1, help="Chunks of each context with --seed. [default: as many as in the file]")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Between chunks. [default: the blend's or the model's]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut, and scored as far as they go.")] = 32,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one answer of a server.")] = 120.0,
    logprobs: Annotated[bool, typer.Option(help="Compare the servers' token probabilities.")] = True,
    warm: Annotated[bool, typer.Option(help="Have all chunks in the chunk cache before the first question.")] = True,
    store_gb: Annotated[float, typer.Option(min=0, help="With --engine hf: memory for chunks, in GiB.")] = 2.0,
    output: Annotated[Path, typer.Option(help="The result file; the plot goes beside it.")] = Path("results/eval.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Ask contenders questions with gold answers: how good, how close to full prefill, how soon.

    Exit status: 0 all answered, 1 an error or answers that failed, 130 interrupted; what came in until then is saved.
    """
    from rich.console import Console
    from rich.markup import escape

    from kvarena.bench.quality import plot
    from kvarena.bench.quality.contenders import default_data_dir
    from kvarena.bench.quality.questions import Redraw, load_exam
    from kvarena.bench.quality.rows import Sheet
    from kvarena.bench.quality.session import Wanted, nothing_reused_note, reuses_nothing, session
    from kvarena.bench.quality.setups import find_reference
    from kvarena.bench.quality.tables import show_rows
    from kvarena.bench.results import check_writable, load_results, save_results, shown_path
    from kvarena.stack.render import show_problems
    from kvarena.worlds.folder import QUESTIONS_NAME

    console = Console(stderr=as_json)
    wanted = Wanted(engine, contender or [], model, separator, timeout_s, logprobs, store_gb)
    with explained():
        check_writable(output)
        path = questions or (data or default_data_dir(engine, model)) / QUESTIONS_NAME
        exam = load_exam(path, data, limit, Redraw.of(seed, num_chunks))
        ratios, layers = decimals(ratio), integers(check_layer) if check_layer else ()
        show_problems(exam.problems, console)
        with session(wanted, console) as asked:
            setups = asked.setups(policy or [DEFAULT_POLICY], ratios, layers)
            if warm:
                asked.warm(exam)
            reference = find_reference(setups)
            attempts, is_interrupted = asked.ask(exam, setups, max_tokens, reference)
    settings = {
        "benchmark": "eval",
        "engine": engine,
        "questions": shown_path(path),
        "num_questions": len(exam.questions),
        "seed": seed,
        "num_chunks": num_chunks,
        "is_interrupted": is_interrupted,
        "reference": reference.label if reference else None,
        "separator": asked.separator,
        "max_tokens": max_tokens,
        "contenders": {name: answerer.describe() for name, answerer in asked.answerers.items()},
    }
    sheet = Sheet(exam, attempts, reference)
    rows = sheet.rows()
    with_gold = [question.to_json() for question in exam.questions]
    save_results(output, settings, rows, questions=with_gold, answers=sheet.answers())
    image = output.with_suffix(".png")
    if has_scores := any(row["correct"] for row in rows):
        plot.plot(output, image)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        show_rows(rows, exam.kinds, console)
        console.print(f"Figures are in {output}{f', the plot in {image}' if has_scores else ''}.", soft_wrap=True)
    if reuses_nothing(attempts):
        console.print(f"[yellow]{escape(nothing_reused_note(asked.separator))}[/yellow]", soft_wrap=True)
    _exit(attempts, is_interrupted, console)


def _exit(attempts: Sequence[Attempt], is_interrupted: bool, console: Console) -> None:
    failed = [attempt for attempt in attempts if attempt.outcome == "failed"]
    if failed:
        console.print(f"[red]{len(failed)} answers failed[/red], the first: {failed[0].reason}", soft_wrap=True)
    if is_interrupted:
        console.print("Interrupted: the figures are of the questions until then.")
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)
