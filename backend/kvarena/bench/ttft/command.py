"""`kvarena bench ttft`: reads the command line, shows progress, prints a table and saves the result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarena.bench.console import explained, integers, progress
from kvarena.bench.ttft.policies import DEFAULT_POLICIES, read_policies

if TYPE_CHECKING:
    from kvarena.bench.results import Row

INTERRUPTED = 130


def ttft(
    shape: Annotated[str | None, typer.Option(help="Start servers on random weights: 180m, 500m or 1b.")] = None,
    model: Annotated[str | None, typer.Option(help="Start servers on it: a local folder or a hub name.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="NAME=URL of any OpenAI server to measure; repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="What blends recompute, POLICY[:RATIO or :MSms][@LAYER][,OPTION=VALUE]; repeatable. "
            f"[default: {', '.join(DEFAULT_POLICIES)}]"
        ),
    ] = None,
    context_tokens: Annotated[str, typer.Option(help="Lengths of the context, separated by commas.")] = (
        "512,1000,2000,4000"
    ),
    state: Annotated[
        str, typer.Option(help="Which chunks are known: warm (all), half, cold (none); none: a prompt without chunks.")
    ] = "warm,half,cold,none",
    concurrency: Annotated[str, typer.Option(help="Requests at once, separated by commas.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Of each measurement; a warm-up comes before.")] = 3,
    chunk_tokens: Annotated[int, typer.Option(help="Size of the chunks.")] = 256,
    question_tokens: Annotated[int, typer.Option(min=1, help="Size of the question.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    store: Annotated[str, typer.Option(help="Of a blend that is started: lmcache or memory.")] = "lmcache",
    store_gb: Annotated[float, typer.Option(min=0.1, help="Its memory for chunks, in GiB.")] = 4.0,
    kv_cache_gb: Annotated[
        int | None, typer.Option(min=1, help="vLLM's memory for KV, in GiB. [default: as in the stack]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of servers that are started, as bfloat16. [default: as the stack chooses]")
    ] = None,
    hf: Annotated[bool, typer.Option(help="Start a server of Hugging Face with SDPA too.")] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="A local folder or a hub name. [default: what the first server serves]")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Between chunks. [default: the blend's]")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one answer.")] = 900.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    output: Annotated[Path, typer.Option(help="The result file.")] = Path("results/ttft.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Time to first token of contenders on the same prompts, in turn, as a client sees it.

    Servers are started for --shape or --model, and stopped at the end; else the running stack's are measured, or those
    of --target; with none of these, servers are started on the town model. Exit status: 0 done, 1 an error or requests
    that failed, 130 interrupted; what came in until then is saved.
    """
    from rich.console import Console

    from kvarena.bench.results import check_writable, load_results, save_results
    from kvarena.bench.ttft.measuring import Bench
    from kvarena.bench.ttft.own_servers import OwnServers
    from kvarena.bench.ttft.servers import Wanted
    from kvarena.bench.ttft.table import show_rows, show_troubles
    from kvarena.bench.ttft.workload import Workload

    console = Console(stderr=as_json)
    rows: list[Row] = []
    settings: dict[str, Any] = {"benchmark": "ttft", "is_interrupted": False}
    with explained():
        check_writable(output)
        lengths, at_once = integers(context_tokens), integers(concurrency)
        states = tuple(one.strip() for one in state.split(","))
        workload = Workload(lengths, states, at_once, chunk_tokens, question_tokens, max_new_tokens, repeats, seed)
        policies = read_policies(policy or DEFAULT_POLICIES, "blend")
        wanted = Wanted(model, shape, target or (), OwnServers(store, store_gb, kv_cache_gb, hf, dtype), timeout_s)
        with wanted.found(workload.longest_tokens, console) as contenders:
            bench = Bench.of(contenders, policies, workload, separator, tokenizer)
            settings |= wanted.settings() | bench.settings()
            try:
                with progress(bench.num_steps, console) as advance:
                    for new in bench.run(advance):
                        rows += new
                        save_results(output, settings, rows)
            except KeyboardInterrupt:
                settings["is_interrupted"] = True
    save_results(output, settings, rows)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        show_rows(rows, console)
        console.print(f"Figures are in {output}.", soft_wrap=True)
    show_troubles(rows, console)
    if settings["is_interrupted"]:
        console.print("Interrupted: the figures are those until then.")
        raise typer.Exit(INTERRUPTED)
    if any(row["num_failed"] for row in rows):
        raise typer.Exit(1)
