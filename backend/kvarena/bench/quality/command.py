"""The commands `kvarena eval` and `kvarena calibrate`.

`eval` asks questions with gold answers and draws a plot. `calibrate` tries policies, check layers, ratios and sinks on
a sample, and makes the best setting the model's own. Heavy imports are inside the commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarena.bench.console import (
    INTERRUPTED,
    AsJson,
    PlottedFile,
    ResultFile,
    console_for,
    decimals,
    explained,
    integers,
    percent,
    save_and_tell,
)
from kvarena.policies.registry import DEFAULT_POLICY, calibrated_policies
from kvarena.splitting import MIN_CHUNK_TOKENS

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.quality.asking import Attempt
    from kvarena.bench.quality.questions import QuestionSet
    from kvarena.bench.quality.session import Session
    from kvarena.bench.results import Row
    from kvarena.bench.variants import Variant


HFModelName = Annotated[
    str | None,
    typer.Option(help="With --engine hf: a local folder or a Hugging Face model name. [default: the town model]"),
]
NumChunks = Annotated[
    int | None,
    typer.Option(min=1, help="With --seed: number of chunks in each context. [default: as many as in the file]"),
]
Separator = Annotated[str | None, typer.Option(help="Text between chunks. [default: the blend's or the model's]")]
TimeLimit = Annotated[float, typer.Option(min=1, help="Time limit for one answer of a server.")]


def evaluate(
    contender: Annotated[
        list[str] | None,
        typer.Option(help="A contender of the running stack, or name=address; repeatable. [default: all that run]"),
    ] = None,
    engine: Annotated[str, typer.Option(help="http: servers; hf: plain and blend in this process.")] = "http",
    model: HFModelName = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Policy of a blend, such as kv_deviation,deviation=values; repeatable. [default: {DEFAULT_POLICY}]"
        ),
    ] = None,
    ratio: Annotated[
        str, typer.Option(help="Shares of the reused tokens to recompute, separated by commas.")
    ] = "0,0.05,0.1,0.15,0.3",
    check_layer: Annotated[
        str | None,
        typer.Option(help="Check layers, for policies that have one, separated by commas. [default: the model's]"),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL with question, answers, optional chunks. [default: the documents']")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the documents. [default: where the questions are]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only this many questions, always the same ones.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Draw new contexts: each question's `needs` among other chunks. [default: the file's own]"),
    ] = None,
    num_chunks: NumChunks = None,
    separator: Separator = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut and scored up to there.")] = 32,
    timeout_s: TimeLimit = 120.0,
    logprobs: Annotated[bool, typer.Option(help="Compare the token probabilities of the servers.")] = True,
    warm: Annotated[bool, typer.Option(help="Fill the chunk cache before the first question.")] = True,
    store_gb: Annotated[float, typer.Option(min=0, help="With --engine hf: memory for chunks, in GiB.")] = 2.0,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            min=MIN_CHUNK_TOKENS,
            help="Documents are split into chunks of at most this many tokens. [default: as the stack does]",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The model's folder, whose tokenizer.json counts them. [default: the stack's]")
    ] = None,
    output: PlottedFile = Path("results/eval.json"),
    as_json: AsJson = False,
) -> None:
    """Ask contenders questions with gold answers, and measure quality, agreement with full prefill, and speed.

    Exit status: 0 all answered, 1 an error or failed answers, 130 interrupted; the answers so far are saved.
    """
    from rich.markup import escape

    from kvarena.bench.quality.questions import Redraw, load_questions, stack_splitter
    from kvarena.bench.quality.scoring import ScoreSheet, show_rows
    from kvarena.bench.quality.session import ContenderOptions, default_data_dir, nothing_reused
    from kvarena.bench.results import shown_path
    from kvarena.bench.variants import find_reference
    from kvarena.documents import QUESTIONS_NAME
    from kvarena.stack.chunk_cache import show_problems

    console = console_for(as_json)
    wanted = ContenderOptions(engine, contender or [], model, separator, timeout_s, logprobs, store_gb)
    with explained(output):
        path = questions or (data or default_data_dir(engine, model)) / QUESTIONS_NAME
        splitter = stack_splitter(chunk_tokens, tokenizer)
        question_set = load_questions(path, data, limit, Redraw.of(seed, num_chunks), splitter)
        ratios, layers = decimals(ratio), integers(check_layer) if check_layer else ()
        show_problems(question_set.problems, console)
        with wanted.session(console) as asked:
            variants = asked.variants(policy or [DEFAULT_POLICY], ratios, layers)
            if warm:
                asked.warm(question_set, variants)
            reference = find_reference(variants)
            attempts, is_interrupted = asked.ask(question_set, variants, max_tokens, reference)
    settings = {
        "benchmark": "eval",
        "engine": engine,
        "questions": shown_path(path),
        "num_questions": len(question_set.questions),
        "seed": seed,
        "num_chunks": num_chunks,
        "is_interrupted": is_interrupted,
        "reference": reference.label if reference else None,
        "separator": asked.separator,
        "max_tokens": max_tokens,
        "contenders": {name: answerer.describe() for name, answerer in asked.answerers.items()},
    }
    sheet = ScoreSheet(question_set, attempts, reference)
    rows = sheet.rows()
    with_gold = [question.to_json() for question in question_set.questions]
    details = {"questions": with_gold, "answers": sheet.answers()}
    has_picture = any(row["correct"] for row in rows)
    save_and_tell(output, settings, rows, as_json, console, show_rows, has_picture=has_picture, **details)
    if note := nothing_reused(attempts, asked.separator):
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    failed = [attempt for attempt in attempts if attempt.outcome == "failed"]
    if failed:
        console.print(f"[red]{len(failed)} answers failed[/red], the first: {failed[0].reason}", soft_wrap=True)
    if is_interrupted:
        console.print("Interrupted: the figures are of the questions until then.")
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(1)


ENOUGH_QUESTIONS = 30
ROUND_QUESTIONS = 6


def calibrate(
    contender: Annotated[
        str, typer.Option(help="A blend of the running stack, or name=address; with --engine hf: blend.")
    ] = "blend",
    engine: Annotated[str, typer.Option(help="http: a server; hf: in this process.")] = "http",
    model: HFModelName = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of documents like those to be served. [default: data]")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL with questions. [default: the folder's, else prompts that suit any text]")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy to try, with options if wanted: kv_deviation,deviation=values,num_filters=2; repeatable. "
            f"[default: {' '.join(calibrated_policies())}]"
        ),
    ] = None,
    check_layer: Annotated[
        str | None, typer.Option(help="Check layers to try, separated by commas. [default: some of the first quarter]")
    ] = None,
    ratio: Annotated[str, typer.Option(help="Ratios to try, separated by commas.")] = "0,0.05,0.1,0.15,0.2,0.3",
    sink_tokens: Annotated[
        str | None,
        typer.Option(
            help="With --engine hf: sinks to try beside the model's own, so many tokens each, separated by commas. "
            "[default: 0,1]"
        ),
    ] = None,
    agreement: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Minimum share of the tokens of full prefill's answers that the blend must produce."
        ),
    ] = 0.9,
    num_questions: Annotated[int, typer.Option(min=1, help="Number of questions.")] = ENOUGH_QUESTIONS,
    seed: Annotated[int | None, typer.Option(help="Draw new contexts for the questions, as eval does.")] = None,
    num_chunks: NumChunks = None,
    separator: Separator = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Answers are compared up to this length.")] = 32,
    timeout_s: TimeLimit = 120.0,
    write: Annotated[bool, typer.Option(help="Write the setting into the model's kvarena.json.")] = True,
    output: ResultFile = Path("results/calibration.json"),
    as_json: AsJson = False,
) -> None:
    """Find the fastest blend that agrees with full prefill, and save it as the model's setting.

    Exit status: 0 found, 1 an error or no setting that agrees well enough, 130 interrupted. Servers read the profile
    when they start.
    """
    from kvarena.bench.quality import calibration
    from kvarena.bench.quality.questions import Redraw, load_questions
    from kvarena.bench.quality.session import ContenderOptions, default_data_dir, nothing_reused
    from kvarena.bench.results import shown_path
    from kvarena.bench.variants import Variant, blend_variants, reads_scores
    from kvarena.core.matching import DEFAULT_SINK_TOKENS
    from kvarena.documents import QUESTIONS_NAME
    from kvarena.stack.chunk_cache import show_problems

    console = console_for(as_json)
    with explained(output):
        sinks = integers(sink_tokens) if sink_tokens else (0, DEFAULT_SINK_TOKENS) if engine == "hf" else ()
        wanted = ContenderOptions(engine, [contender], model, separator, timeout_s, more_sinks=sinks)
        folder = data or (questions.parent if questions else default_data_dir(engine, model))
        path = questions or folder / QUESTIONS_NAME
        redraw = Redraw.of(seed, num_chunks)
        has_questions = questions is not None or path.is_file()
        question_set = (
            load_questions(path, folder, num_questions, redraw)
            if has_questions
            else calibration.document_questions(folder, num_questions, seed or 0, num_chunks)
        )
        show_problems(question_set.problems, console)
        with wanted.session(console) as asked:
            (blend,) = asked.answerers.values()
            if not blend.is_blend:
                raise ValueError(f"{blend.name} doesn't blend; there is nothing to calibrate")
            layers = integers(check_layer) if check_layer else calibration.check_layers(blend.num_layers)
            settings_to_try = blend_variants(blend.name, policy or calibrated_policies(), decimals(ratio), layers)
            if not check_layer:  # by stored scores it looks at a layer only where there are none
                settings_to_try = [
                    one
                    for one in settings_to_try
                    if one.check_layer in (None, layers[0]) or not reads_scores(one.policy)
                ]
            sinks_to_try: Sequence[int | None] = blend.sinks or [None]
            candidates = [replace(one, sink_tokens=sink) for one in settings_to_try for sink in sinks_to_try]
            asked.warm(question_set, candidates)
            attempts, is_interrupted = _race(
                asked, question_set, Variant(blend.name, "all"), candidates, max_tokens, agreement
            )
            rows = calibration.calibration_rows(attempts)
            if not is_interrupted and not any(row["token_agreement"] for row in rows):
                reasons = sorted({attempt.reason for attempt in attempts if attempt.reason})
                raise ValueError(f"nothing could be compared: {'; '.join(reasons) or 'no log-probabilities came'}")
            if not is_interrupted and (note := nothing_reused(attempts, asked.separator)):
                raise ValueError(note)
    if is_interrupted:
        console.print("Interrupted: nothing was decided.")
        raise typer.Exit(INTERRUPTED)
    num_questions = max(row["num_questions"] for row in rows)
    chosen = calibration.fastest([row for row in rows if row["num_questions"] == num_questions], agreement)
    settings: dict[str, Any] = {
        "benchmark": "calibrate",
        "engine": engine,
        "documents": shown_path(folder),
        "num_questions": num_questions,
        "seed": seed,
        "num_chunks": num_chunks,
        "agreement": agreement,
        "max_tokens": max_tokens,
        "separator": asked.separator,
        "contender": blend.describe(),
        "sinks": calibration.sink_rows(attempts),
        "chosen": chosen and Variant.of_row(chosen).profile,
    }

    def show(rows: Sequence[Row], console: Console) -> None:
        calibration.show_rows(rows, settings["sinks"], chosen, console)

    save_and_tell(output, settings, rows, as_json, console, show)
    for note in filter(None, (sample_note(num_questions), unscored_note(rows), one_sink_note(blend.sinks))):
        console.print(note, soft_wrap=True, highlight=False)
    if chosen is None:
        best = calibration.closest(rows)
        console.print(
            f"[red]No setting reaches {100 * agreement:g} % agreement[/red]"
            + (f"; the closest, {Variant.of_row(best).label}, has {percent(best['token_agreement'])} %" if best else "")
            + ". Nothing was written. Try higher ratios, other check layers or a lower --agreement.",
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


def _race(
    asked: Session,
    question_set: QuestionSet,
    full: Variant,
    candidates: Sequence[Variant],
    max_tokens: int,
    agreement: float,
) -> tuple[list[Attempt], bool]:
    """The candidates' attempts, and whether it was interrupted.

    All get the first questions; from round to round only those that may still be chosen are asked on. Full prefill
    answers each question once.
    """
    from kvarena.bench.quality import calibration

    attempts: list[Attempt] = []
    left = list(candidates)
    for start in range(0, len(question_set.questions), ROUND_QUESTIONS):
        numbers = range(len(question_set.questions))[start : start + ROUND_QUESTIONS]
        variants = list(dict.fromkeys([full, *left]))
        found, is_interrupted = asked.ask(question_set, variants, max_tokens, full, compares_only=True, numbers=numbers)
        attempts += [attempt for attempt in found if attempt.variant in left]
        if is_interrupted:
            return attempts, True
        rows = calibration.calibration_rows([attempt for attempt in attempts if attempt.variant in left])
        left = calibration.still_in_the_race(rows, agreement)
        if not left:
            break
    return attempts, False


def sample_note(num_questions: int) -> str:
    """What the finding rests on, with a warning where that is little."""
    found = f"This rests on {num_questions} question{'' if num_questions == 1 else 's'}"
    if num_questions >= ENOUGH_QUESTIONS:
        return f"{found}."
    return (
        f"{found} only: with fewer than {ENOUGH_QUESTIONS}, others of the same kind may well lead to another setting. "
        "--num-questions takes more, where the file of questions has them."
    )


def unscored_note(rows: Sequence[Row]) -> str:
    """Says where a policy had to do without the stored scores it goes by; else empty."""
    found = [row for row in rows if row["num_unscored"]]
    if not found:
        return ""
    num_answers, num_unscored = (sum(row[name] for row in found) for name in ("num_questions", "num_unscored"))
    return (
        f"{num_unscored} of {num_answers} answers had a chunk without scores, where {found[0]['policy']} chose by the "
        "values at its check layer. Scores need three chunks at least, and some text before and after each."
    )


def one_sink_note(sinks: Sequence[int]) -> str:
    """Says what wasn't compared where a server had only one sink; else empty."""
    if len(sinks) != 1:
        return ""
    (sink,) = sinks
    return (
        f"All of this is with sink_tokens {sink}. A server has the one it was started with (SINK_TOKENS); "
        "--engine hf compares several."
    )
