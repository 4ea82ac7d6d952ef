"""`kvarena calibrate`: tries policies, check layers and ratios on a sample, and makes the best one the model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import decimals, explained, integers

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.results import Row

DEFAULT_POLICIES = ("kv_deviation", "kv_deviation,deviation=values", "chunk_head", "query_attention")
ENOUGH_QUESTIONS = 30
INTERRUPTED = 130


def calibrate(
    contender: Annotated[
        str, typer.Option(help="A blend of the running stack, or name=address; with --engine hf: blend.")
    ] = "blend",
    engine: Annotated[str, typer.Option(help="http: a server; hf: in this process.")] = "http",
    model: Annotated[
        str | None, typer.Option(help="With --engine hf: a local folder or a hub name. [default: the town model]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of .txt and .md chunks like those to be served. [default: data]")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL with questions. [default: the folder's, else prompts that suit any text]")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy to try, perhaps with options: kv_deviation,deviation=values,num_filters=2; repeatable. "
            f"[default: {' '.join(DEFAULT_POLICIES)}]"
        ),
    ] = None,
    check_layer: Annotated[
        str | None, typer.Option(help="Check layers to try, separated by commas. [default: some up to half of all]")
    ] = None,
    ratio: Annotated[str, typer.Option(help="Ratios to try, separated by commas.")] = "0,0.05,0.1,0.15,0.2,0.3",
    target: Annotated[float, typer.Option(min=0, max=1, help="Least agreement with full prefill (token F1).")] = 0.97,
    num_questions: Annotated[int, typer.Option(min=1, help="Size of the sample.")] = ENOUGH_QUESTIONS,
    separator: Annotated[str | None, typer.Option(help="Between chunks. [default: the blend's or the model's]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Answers are compared up to here.")] = 24,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one answer of a server.")] = 120.0,
    write: Annotated[bool, typer.Option(help="Write the setting into the model's kvarena.json.")] = True,
    output: Annotated[Path, typer.Option(help="The result file.")] = Path("results/calibration.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Find the fastest blend of a model that agrees with full prefill, and make it the model's own.

    Exit status: 0 found, 1 an error or no setting that agrees enough, 130 interrupted. Servers read the profile when
    they start.
    """
    from rich.console import Console

    from kvarena.bench.quality import calibration
    from kvarena.bench.quality.contenders import default_data_dir
    from kvarena.bench.quality.questions import load_exam
    from kvarena.bench.quality.rows import ALL_KINDS, Sheet
    from kvarena.bench.quality.session import Wanted, session
    from kvarena.bench.quality.setups import Setup, blend_setups
    from kvarena.bench.results import check_writable, load_results, save_results, shown_path
    from kvarena.worlds.folder import QUESTIONS_NAME

    console = Console(stderr=as_json)
    wanted = Wanted(engine, [contender], model, separator, timeout_s, has_logprobs=False)
    with explained():
        check_writable(output)
        folder = data or (questions.parent if questions else default_data_dir(engine, model))
        path = questions or folder / QUESTIONS_NAME
        has_questions = questions is not None or path.is_file()
        exam = (
            load_exam(path, folder, num_questions)
            if has_questions
            else calibration.document_exam(folder, num_questions)
        )
        with session(wanted, console) as asked:
            (blend,) = asked.answerers.values()
            if not blend.is_blend:
                raise ValueError(f"{blend.name} doesn't blend; there is nothing to calibrate")
            layers = integers(check_layer) if check_layer else calibration.check_layers(blend.num_layers)
            candidates = blend_setups(blend.name, policy or DEFAULT_POLICIES, decimals(ratio), layers)
            asked.warm(exam)
            full, is_interrupted = asked.ask(exam, [Setup(blend.name, "all")], max_tokens)
            if not is_interrupted:
                exam = calibration.with_answers_of(exam, full)
                attempts, is_interrupted = asked.ask(exam, candidates, max_tokens)
    if is_interrupted:
        console.print("Interrupted: nothing was decided.")
        raise typer.Exit(INTERRUPTED)
    rows = [
        row for row in Sheet(exam, calibration.as_far_as_they_go(attempts), None).rows() if row["kind"] == ALL_KINDS
    ]
    chosen = calibration.fastest(rows, target)
    settings = {
        "benchmark": "calibrate",
        "engine": engine,
        "documents": shown_path(folder),
        "num_questions": len(exam.questions),
        "target": target,
        "separator": asked.separator,
        "contender": blend.describe(),
        "chosen": chosen and Setup.of_row(chosen).choices,
    }
    save_results(output, settings, rows)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        _show(rows, chosen, console)
    console.print(sample_note(len(exam.questions)), soft_wrap=True)
    if chosen is None:
        best = max((row["f1"]["mean"] for row in rows if row["f1"]), default=0.0)
        console.print(
            f"[red]No setting reaches {100 * target:g} % agreement[/red]; the closest has {100 * best:.1f} %. "
            "Nothing was written. Try higher ratios or other check layers.",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    if write and blend.model_folder:
        with explained():
            profile = calibration.write_profile(blend.model_folder, chosen, asked.separator)
        console.print(
            f"Written to {profile}; a stack that is started from now on uses it, `restart` keeps the old one.",
            soft_wrap=True,
        )
    elif write:
        console.print("The model isn't a folder on this machine: set BLEND_POLICY and the like where it is served.")


def sample_note(num_questions: int) -> str:
    """What the finding rests on, and that it is little where it is."""
    found = f"This rests on {num_questions} question{'' if num_questions == 1 else 's'}"
    if num_questions >= ENOUGH_QUESTIONS:
        return f"{found}."
    return (
        f"{found} only: with fewer than {ENOUGH_QUESTIONS}, others of the same kind may well lead to another setting. "
        "--num-questions takes more, where the file of questions has them."
    )


def _show(rows: Sequence[Row], chosen: Row | None, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from kvarena.bench.quality.setups import Setup

    table = Table(title="Agreement with full prefill (token F1, %)", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in ("policy", "layer", "ratio", "agreement", "interval", "TTFT ms", "failed", ""):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        found = row["f1"]
        table.add_row(
            Setup.of_row(row).policy_label,
            "-" if row["check_layer"] is None else str(row["check_layer"]),
            "-" if row["ratio"] is None else f"{100 * row['ratio']:g} %",
            f"{100 * found['mean']:.1f}" if found else "-",
            f"{100 * found['low']:.0f}-{100 * found['high']:.0f}" if found else "-",
            f"{row['ttft_ms']['median']:,.0f}" if row["ttft_ms"] else "-",
            str(row["num_failed"]),
            "chosen" if row is chosen else "",
        )
    console.print(table)
