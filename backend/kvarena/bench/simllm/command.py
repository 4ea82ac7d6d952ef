"""`kvarena bench simllm`: speed on a shape, quality on a trained model, over the same kind of stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import decimals, explained, progress

if TYPE_CHECKING:
    from kvarena.bench.results import Row


def simllm(
    shape: Annotated[str, typer.Option(help="Speed: random weights of a size, 180m, 500m or 1b.")] = "180m",
    model: Annotated[
        str | None, typer.Option(help="Quality: a Llama, a local folder or a hub name. [default: the town model]")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL with questions on the chunks beside it. [default: the shipped ones]")
    ] = None,
    num_tasks: Annotated[int, typer.Option(min=2, help="Speed: tasks of the stream.")] = 16,
    num_quality_tasks: Annotated[int, typer.Option(min=2, help="Quality: tasks of the stream.")] = 120,
    similar: Annotated[float, typer.Option(min=0, max=1, help="Share of tasks similar to an earlier one.")] = 0.5,
    modes: Annotated[str, typer.Option(help="aligned, top_layer or both, separated by a comma.")] = "aligned,top_layer",
    thresholds: Annotated[str, typer.Option(help="Cosine similarities, separated by commas.")] = "0.8,0.998,0.9997",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are generated for each answer.")] = 8,
    max_cache_size: Annotated[int, typer.Option(min=1, help="Tasks that each contender keeps.")] = 100,
    dtype: Annotated[
        str | None, typer.Option(help="Such as bfloat16, or auto: the model's. [default: float32 on a CPU, else auto]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the stream and the random weights.")] = 0,
    output: Annotated[Path, typer.Option(help="The result file; the plot goes beside it.")] = Path(
        "results/simllm.json"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """What reuse between similar tasks gains in speed and costs in quality, by mode and threshold.

    All contenders answer the same tasks in turn, in this process, each with tasks of its own, over the same weights.
    """
    from rich.console import Console

    from kvarena.bench.quality.questions import load_exam
    from kvarena.bench.results import check_writable, load_results, save_results, shown_path
    from kvarena.bench.simllm import measuring, plot
    from kvarena.bench.simllm.contenders import setups
    from kvarena.bench.simllm.table import show_quality, show_speed
    from kvarena.stack.model import find_model
    from kvarena.worlds.folder import QUESTIONS_NAME

    console = Console(stderr=as_json)
    with explained():
        check_writable(output)
        path = questions or find_model(model, "cpu").data_dir / QUESTIONS_NAME
        exam = load_exam(path)
        chosen = setups([mode.strip() for mode in modes.split(",")], decimals(thresholds))
        bench = measuring.Bench(exam, chosen, similar, max_new_tokens, max_cache_size, dtype, seed)
        with progress((num_tasks + num_quality_tasks) * len(chosen), console) as advance:
            speed = bench.speed(shape, num_tasks, advance)
            quality = bench.quality(model, num_quality_tasks, advance)
    settings = {"benchmark": "simllm", "shape": shape, "questions": shown_path(path), **bench.settings()}
    rows: list[Row] = [*speed.rows, *quality.rows]
    save_results(output, settings, rows, answers=[*speed.answers, *quality.answers])
    image = output.with_suffix(".png")
    plot.plot(output, image)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        show_speed(speed.rows, console)
        show_quality(quality.rows, console)
        console.print(f"Figures are in {output}, the plot in {image}.", soft_wrap=True)
