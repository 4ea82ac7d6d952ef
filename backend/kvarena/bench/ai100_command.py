"""`kvarena bench ai100`: reads the command line, shows progress, prints two tables and saves the result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.console import explained, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ai100.engine import AI100Engine
    from kvarena.bench.ai100_bench import AI100Workload
    from kvarena.bench.results import Row


def ai100(
    model: Annotated[str | None, typer.Option(help="A local folder or a hub name. [default: the town model]")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a size, 180m, 500m or 1b.")] = None,
    runtime: Annotated[str, typer.Option(help="auto, qaic (the card), host, or onnx.")] = "auto",
    history_tokens: Annotated[int, typer.Option(min=1, help="Of each conversation's first message.")] = 1000,
    num_turns: Annotated[int, typer.Option(min=2, help="Turns of a conversation.")] = 10,
    num_repeats: Annotated[int, typer.Option(min=1, help="Conversations for the time to first token.")] = 2,
    num_conversations: Annotated[int, typer.Option(min=1, help="Conversations at once, for the throughput.")] = 4,
    num_rounds: Annotated[int, typer.Option(min=1, help="Turns of each of them, at once and in turn.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    throughput_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer, for the throughput.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    output: Annotated[Path, typer.Option(help="The result file; the plot goes beside it.")] = Path(
        "results/ai100.json"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """What KV slots gain in multi-turn chat: follow-ups with and without them, several conversations at once."""
    from rich.console import Console

    from kvarena.bench import ai100_bench, ai100_plot
    from kvarena.bench.results import check_writable, load_results, save_results

    console = Console(stderr=as_json)
    with explained():
        check_writable(output)
        workload = ai100_bench.AI100Workload(
            history_tokens=history_tokens,
            num_turns=num_turns,
            num_repeats=num_repeats,
            num_conversations=num_conversations,
            max_new_tokens=max_new_tokens,
            throughput_tokens=throughput_tokens,
            num_rounds=num_rounds,
            seed=seed,
        )
        engine = _engine(model, shape, runtime, workload)
        try:
            with progress(workload.num_steps, console) as advance:
                rows = ai100_bench.run(engine, workload, advance)
        finally:
            engine.close()
    described = engine.describe() | {"model": engine.model_name}
    save_results(output, ai100_bench.settings(workload, **described), rows)
    image = output.with_suffix(".png")
    ai100_plot.plot(output, image)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        _show(rows, console)
        console.print(f"Figures are in {output}, the plot in {image}.", soft_wrap=True)


def _engine(model: str | None, shape: str | None, runtime: str, workload: AI100Workload) -> AI100Engine:
    """One slot more than conversations: turns without the cache run in it."""
    from ai100.runtimes.runtime import StaticShapes
    from ai100.settings import AI100Settings, open_engine
    from kvarena.bench.shapes import model_folder

    num = workload.num_conversations
    return open_engine(
        AI100Settings(
            model=model_folder(model, shape),
            runtime=runtime,
            shapes=StaticShapes(min(128, workload.ctx_len), workload.ctx_len, num, num + 1),
            random_weights=shape is not None,
            max_context=workload.ctx_len,
            served_model_name=shape or model or "town",
        )
    )


def _show(rows: list[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table

    from kvarena.bench.ai100_bench import follow_up_speedup

    turns = Table(title="Time to first token; medians", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in ("turn", "prefilled", "slots ms", "prefilled", "no cache ms", "sooner by"):
        turns.add_column(name, justify="right", no_wrap=True)
    modes = Table(title="Throughput", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in ("conversations", "tokens/s", "times", "least to most"):
        modes.add_column(name, justify="left" if name == "conversations" else "right", no_wrap=True)
    for row in rows:
        if row["measure"] == "first token":
            turns.add_row(
                str(row["turn"]),
                f"{row['slots_prefilled_tokens']:,}",
                f"{row['slots_ttft_ms']['median']:,.1f}",
                f"{row['no_cache_prefilled_tokens']:,}",
                f"{row['no_cache_ttft_ms']['median']:,.1f}",
                f"{row['sooner']['median']:,.1f}x",
            )
        else:
            times = row["times"]
            modes.add_row(
                f"{row['num_conversations']} {row['mode']}",
                f"{row['tokens_per_s']['median']:,.1f}",
                f"{times['median']:.2f}x",
                f"{times['low']:.2f} to {times['high']:.2f}",
            )
    console.print(turns)
    sooner = follow_up_speedup(rows)
    console.print(f"Follow-ups sooner by {sooner['median']:.1f}x ({sooner['low']:.1f} to {sooner['high']:.1f})")
    console.print(modes)
