"""`kvarena bench`: reads the command line, shows progress, prints a table and saves the result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarena.bench.ai100_command import ai100
from kvarena.bench.console import explained, integers, progress
from kvarena.bench.simllm.command import simllm
from kvarena.bench.ttft.command import ttft

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.prefix_bench import PrefixTarget
    from kvarena.bench.results import Row
    from kvarena.engines.prefix.engine import PrefixEngine

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure contenders and save the figures.")
app.command()(simllm)
app.command()(ai100)
app.command()(ttft)


@app.command()
def prefix(
    url: Annotated[
        str | None, typer.Option(help="A prefix contender's address. [default: an engine in this process]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without --url: a local folder or a hub name. [default: the town model]")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Without --url: random weights of a size, 180m, 500m or 1b.")
    ] = None,
    context_tokens: Annotated[str, typer.Option(help="Lengths of the shared prefix, separated by commas.")] = (
        "470,1000,4000"
    ),
    levels: Annotated[
        str, typer.Option(help="Which levels of caching, separated by commas.")
    ] = "no KV cache,KV cache,prefix cache",
    num_requests: Annotated[int, typer.Option(min=1, help="Repetitions of each.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 8,
    cache_gb: Annotated[float, typer.Option(min=0, help="Without --url: memory for prefixes, in GiB.")] = 2.0,
    storage: Annotated[str, typer.Option(help="Without --url: cpu or device.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    output: Annotated[Path, typer.Option(help="The result file; the plot goes beside it.")] = Path(
        "results/prefix.json"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """What each layer of caching gains: none, a KV cache, a prefix cache; cold, repeated, with a new question."""
    from rich.console import Console

    from kvarena.bench import prefix_bench, prefix_plot
    from kvarena.bench.results import check_writable, load_results, save_results

    console = Console(stderr=as_json)
    with explained():
        check_writable(output)
        workload = prefix_bench.PrefixWorkload(
            context_tokens=integers(context_tokens),
            levels=tuple(level.strip() for level in levels.split(",")),
            num_requests=num_requests,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        target, described = _target(url, model, shape, cache_gb, storage)
        with progress(workload.num_steps, console) as advance:
            rows = prefix_bench.run(target, workload, advance)
    save_results(output, prefix_bench.settings(workload, **described), rows)
    image = output.with_suffix(".png")
    prefix_plot.plot(output, image)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        _show_prefix(rows, console)
        console.print(f"Figures are in {output}, the plot in {image}.", soft_wrap=True)


@app.command()
def tasks(
    num_tasks: Annotated[str, typer.Option(help="How many tasks are kept, separated by commas.")] = "1000,10000,100000",
    embedding_dim: Annotated[int, typer.Option(min=1, help="Size of a task's embedding.")] = 4096,
    num_queries: Annotated[int, typer.Option(min=1, help="Searches for each number of tasks.")] = 200,
    similarity: Annotated[float, typer.Option(help="Cosine of a query and the task it is made from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the embeddings.")] = 0,
    output: Annotated[Path, typer.Option(help="The result file.")] = Path("results/tasks.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """The search for a similar task: its time, and how often it finds one of the query's cluster."""
    from rich.console import Console

    from kvarena.bench import task_search_bench
    from kvarena.bench.results import check_writable, load_results, save_results

    console = Console(stderr=as_json)
    with explained():
        check_writable(output)
        workload = task_search_bench.TaskSearchWorkload(
            integers(num_tasks), embedding_dim, num_queries, similarity, seed
        )
        with progress(workload.num_steps, console) as advance:
            rows = task_search_bench.run(workload, advance)
    save_results(output, {"benchmark": "tasks", **vars(workload)}, rows)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        _show_tasks(rows, console)
        console.print(f"Figures are in {output}.", soft_wrap=True)


@app.command()
def decode(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI server of the same model to measure too, such as plain vLLM.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A local folder or a hub name. [default: the town model]")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a size, 180m, 500m or 1b.")] = None,
    context_tokens: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "128,1024",
    num_requests: Annotated[int, typer.Option(min=1, help="Repetitions of each.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 33,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    output: Annotated[Path, typer.Option(help="The result file.")] = Path("results/decode.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Time per output token: the PyTorch engine, Hugging Face generate, and a server if one is named."""
    from rich.console import Console

    from kvarena.bench import decode_bench
    from kvarena.bench.results import check_writable, load_results, save_results
    from kvarena.bench.shapes import model_folder
    from kvarena.stack.settings import shown_api_key

    console = Console(stderr=as_json)
    with explained():
        check_writable(output)
        workload = decode_bench.DecodeWorkload(integers(context_tokens), max_new_tokens, num_requests, seed)
        contenders = {url: decode_bench.server_decode(url, shown_api_key())} if url else {}
        folder = model_folder(model, shape)
        engine = _engine(folder, model, shape, cache_gb=0.0, storage="cpu")
        reference = decode_bench.generate_decode(folder, engine.model, random_weights=shape is not None)
        contenders |= {decode_bench.ENGINE: decode_bench.engine_decode(engine), decode_bench.GENERATE: reference}
        with progress(workload.num_steps, console) as advance:
            rows = decode_bench.run(contenders, engine.model.vocab_size, workload, advance)
    settings = {"benchmark": "decode", "model": engine.model_name, "url": url, **vars(workload)}
    save_results(output, settings, rows)
    if as_json:
        print(json.dumps(load_results(output), indent=1))
    else:
        _show_decode(rows, console)
        console.print(f"Figures are in {output}.", soft_wrap=True)


def _target(
    url: str | None, model: str | None, shape: str | None, cache_gb: float, storage: str
) -> tuple[PrefixTarget, dict[str, object]]:
    from kvarena.bench.prefix_targets import InProcess, Server
    from kvarena.bench.shapes import model_folder
    from kvarena.stack.settings import shown_api_key

    if url:
        if model or shape:
            raise ValueError("--url measures the server's own model; --model and --shape go without it")
        return Server(url, shown_api_key()), {"url": url}
    engine = _engine(model_folder(model, shape), model, shape, cache_gb, storage)
    return InProcess(engine), {"model": engine.model_name, "storage": storage, "cache_gb": cache_gb}


def _engine(folder: str, model: str | None, shape: str | None, cache_gb: float, storage: str) -> PrefixEngine:
    from kvarena.engines.hf_model import HFModel
    from kvarena.engines.prefix.engine import PrefixEngine

    loaded = HFModel.load(folder, random=shape is not None)
    return PrefixEngine(loaded, shape or model or "town", cache_bytes=int(cache_gb * 2**30), storage=storage)


def _show_prefix(rows: list[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table

    title = "Time to first token, lookup and transfer included; medians"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in ("level", "scenario"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "reused", "TTFT ms", "ms/token", "sooner by"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["level"],
            row["scenario"],
            f"{row['context_tokens']:,}",
            f"{row['reused_ratio']:.0%}",
            f"{row['ttft_ms']['median']:,.1f}",
            f"{row['tpot_ms']['median']:,.1f}",
            f"{row['speedup_vs_cold']['median']:,.1f}x",
            end_section=row["scenario"] == "new question",
        )
    console.print(table)


def _show_tasks(rows: list[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="Search for a similar task", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in ("tasks", "median ms", "p95 ms", "processor ms", "found"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['num_tasks']:,}",
            f"{row['lookup_ms']['median']:.2f}",
            f"{row['lookup_ms']['p95']:.2f}",
            f"{row['lookup_cpu_ms']['median']:.2f}",
            f"{row['found_ratio']:.1%}",
        )
    console.print(table)


def _show_decode(rows: list[Row], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="Time per output token; medians", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("contender", no_wrap=True)
    for name in ("prompt", "ms/token", "of engine's", "least to most"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratio = row["ratio_to_engine"]
        table.add_row(
            row["contender"],
            f"{row['context_tokens']:,}",
            f"{row['tpot_ms']['median']:,.2f}",
            f"{ratio['median']:.2f}x",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        )
    console.print(table)
