"""The commands `kvarena bench ...`, `kvarena soak` and `kvarena report`.

Each measurement shows progress, prints tables and saves a result file. This is imported when the command line starts:
everything heavy is imported inside the commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarena.bench.console import (
    INTERRUPTED,
    AnswerTokens,
    AsJson,
    Model,
    PlottedFile,
    Repetitions,
    ResultFile,
    Seed,
    Shape,
    console_for,
    decimals,
    explained,
    integers,
    progress,
    save_and_tell,
    words,
)
from kvarena.bench.variants import DEFAULT_POLICIES, read_policies

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.results import Row

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure contenders and save the figures.")

ContextTokens = Annotated[str, typer.Option(help="Lengths of the context, separated by commas.")]
OwnDtype = Annotated[
    str | None,
    typer.Option(help="Data type of servers that are started, such as bfloat16. [default: as the stack chooses]"),
]
DEFAULT_PATTERN = "results/*.json"
TimeLimit = Annotated[float, typer.Option(min=1, help="Time limit for one answer.")]


@app.command()
def simllm(
    shape: Annotated[
        str, typer.Option(help="Speed: a model of this size with random weights: 180m, 500m or 1b.")
    ] = "180m",
    model: Annotated[
        str | None,
        typer.Option(
            help="Quality: a Llama model, a local folder or a Hugging Face model name. [default: the town model]"
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="JSONL with questions about the chunks in the same folder. [default: the shipped ones]"),
    ] = None,
    num_tasks: Annotated[int, typer.Option(min=2, help="Speed: tasks of the stream.")] = 16,
    num_quality_tasks: Annotated[int, typer.Option(min=2, help="Quality: tasks of the stream.")] = 120,
    similar: Annotated[float, typer.Option(min=0, max=1, help="Share of tasks similar to an earlier one.")] = 0.5,
    modes: Annotated[
        str, typer.Option(help="Of aligned, top_layer, sandwich; separated by commas.")
    ] = "aligned,top_layer",
    thresholds: Annotated[str, typer.Option(help="Cosine similarities, separated by commas.")] = "0.8,0.998,0.9997",
    max_new_tokens: AnswerTokens = 8,
    max_cache_size: Annotated[int, typer.Option(min=1, help="Tasks that each contender keeps.")] = 100,
    dtype: Annotated[
        str | None, typer.Option(help="Such as bfloat16, or auto: the model's. [default: float32 on a CPU, else auto]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the stream and the random weights.")] = 0,
    output: PlottedFile = Path("results/simllm.json"),
    as_json: AsJson = False,
) -> None:
    """Measure what reuse between similar tasks gains in speed and costs in quality, by mode and threshold.

    All contenders answer the same tasks in turn, in this process, each with tasks of its own, over the same weights.
    """
    from kvarena.bench.quality.questions import load_questions
    from kvarena.bench.results import shown_path
    from kvarena.bench.simllm import Bench, show_quality, show_speed, variants
    from kvarena.documents import QUESTIONS_NAME
    from kvarena.model import find_model

    console = console_for(as_json)
    with explained(output):
        path = questions or find_model(model, "cpu").data_dir / QUESTIONS_NAME
        question_set = load_questions(path)
        chosen = variants(words(modes), decimals(thresholds))
        bench = Bench(question_set, chosen, similar, max_new_tokens, max_cache_size, dtype, seed)
        with progress((num_tasks + num_quality_tasks) * len(chosen), console) as advance:
            speed, speed_answers = bench.speed(shape, num_tasks, advance)
            quality, quality_answers = bench.quality(model, num_quality_tasks, advance)
    settings = {"benchmark": "simllm", "shape": shape, "questions": shown_path(path), **bench.settings()}

    def show(rows: Sequence[Row], console: Console) -> None:
        show_speed(speed, console)
        show_quality(quality, console)

    answers = [*speed_answers, *quality_answers]
    save_and_tell(output, settings, [*speed, *quality], as_json, console, show, answers=answers)


@app.command()
def ai100(
    model: Model = None,
    shape: Shape = None,
    runtime: Annotated[str, typer.Option(help="auto, qaic (the card), host, or onnx.")] = "auto",
    history_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each conversation's first message.")] = 1000,
    num_turns: Annotated[int, typer.Option(min=2, help="Turns of a conversation.")] = 10,
    num_repeats: Annotated[int, typer.Option(min=1, help="Conversations for the time to first token.")] = 2,
    num_conversations: Annotated[int, typer.Option(min=1, help="Concurrent conversations (throughput).")] = 4,
    num_rounds: Annotated[
        int, typer.Option(min=1, help="Turns per conversation, run concurrently and then one by one.")
    ] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 16,
    throughput_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer, for the throughput.")] = 48,
    seed: Seed = 0,
    output: PlottedFile = Path("results/ai100.json"),
    as_json: AsJson = False,
) -> None:
    """Measure what KV slots gain in multi-turn chat: follow-ups with and without them, and several conversations at
    once."""
    from kvarena.bench.ai100 import AI100Workload, engine_for, run, show_rows

    console = console_for(as_json)
    with explained(output):
        workload = AI100Workload(
            history_tokens=history_tokens,
            num_turns=num_turns,
            num_repeats=num_repeats,
            num_conversations=num_conversations,
            max_new_tokens=max_new_tokens,
            throughput_tokens=throughput_tokens,
            num_rounds=num_rounds,
            seed=seed,
        )
        engine = engine_for(workload, model, shape, runtime)
        try:
            with progress(workload.num_steps, console) as advance:
                rows = run(engine, workload, advance)
        finally:
            engine.close()
    settings = {"benchmark": "ai100", **engine.describe(), "model": engine.model_name, **vars(workload)}
    save_and_tell(output, settings, rows, as_json, console, show_rows)


@app.command()
def ttft(
    shape: Annotated[str | None, typer.Option(help="Start servers on random weights: 180m, 500m or 1b.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Start servers with this model: a local folder or a Hugging Face model name.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="NAME=URL of an OpenAI-compatible server to measure; repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Selection policies of blends, POLICY[:RATIO or :MSms][@LAYER][,OPTION=VALUE]; repeatable. "
            f"[default: {', '.join(DEFAULT_POLICIES)}]"
        ),
    ] = None,
    context_tokens: ContextTokens = "512,1000,2000,4000",
    state: Annotated[
        str, typer.Option(help="Which chunks are known: warm (all), half, cold (none); none: a prompt without chunks.")
    ] = "warm,half,cold,none",
    concurrency: Annotated[str, typer.Option(help="Concurrent requests, separated by commas.")] = "1",
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement, after one warm-up.")] = 3,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of each chunk.")] = 256,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    store: Annotated[str, typer.Option(help="Chunk store of a blend that is started: lmcache or memory.")] = "lmcache",
    store_gb: Annotated[float, typer.Option(min=0.1, help="Memory of that store, in GiB.")] = 4.0,
    kv_cache_gb: Annotated[
        int | None, typer.Option(min=1, help="vLLM's memory for KV, in GiB. [default: as in the stack]")
    ] = None,
    dtype: OwnDtype = None,
    hf: Annotated[bool, typer.Option(help="Start a Hugging Face server with SDPA too.")] = True,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A local folder or a Hugging Face model name. [default: what the first server serves]"),
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Text between chunks. [default: the blend's]")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of documents to cut the known chunks from, repeated where they are short. "
            "[default: chunks of random words]"
        ),
    ] = None,
    timeout_s: TimeLimit = 900.0,
    seed: Seed = 0,
    output: ResultFile = Path("results/ttft.json"),
    as_json: AsJson = False,
) -> None:
    """Measure the time to first token of contenders on the same prompts, in turn, as a client sees it.

    With --shape or --model, servers are started, and stopped at the end; else those of --target or of the running stack
    are measured; with none of these, servers are started on the town model. Exit status: 0 done, 1 an error or failed
    requests, 130 interrupted; the answers so far are saved.
    """
    from kvarena.bench.prompts import Workload
    from kvarena.bench.results import save_results
    from kvarena.bench.servers import Servers
    from kvarena.bench.ttft import Bench, show_rows, show_warnings

    console = console_for(as_json)
    rows: list[Row] = []
    settings: dict[str, Any] = {"benchmark": "ttft", "is_interrupted": False}
    with explained(output):
        lengths, at_once = integers(context_tokens), integers(concurrency)
        workload = Workload(
            lengths, words(state), at_once, chunk_tokens, question_tokens, max_new_tokens, repeats, seed
        )
        policies = read_policies(policy or DEFAULT_POLICIES, "blend")
        wanted = Servers(model, shape, target or (), timeout_s, store, store_gb, kv_cache_gb, hf, dtype)
        workload = replace(workload, has_fixed_opening=wanted.starts_servers)
        with wanted.found(workload.longest_tokens, console) as contenders:
            bench = Bench(contenders, policies, workload, separator, tokenizer, data)
            settings |= wanted.settings() | bench.settings()
            try:
                with progress(bench.num_steps, console) as advance:
                    for new in bench.run(advance):
                        rows += new
                        save_results(output, settings, rows)
            except KeyboardInterrupt:
                settings["is_interrupted"] = True
    save_and_tell(output, settings, rows, as_json, console, show_rows)
    show_warnings(rows, console)
    if settings["is_interrupted"]:
        console.print("Interrupted: the figures are those until then.")
        raise typer.Exit(INTERRUPTED)
    if any(row["num_failed"] for row in rows):
        raise typer.Exit(1)


@app.command()
def sustained(
    shape: Shape = None,
    model: Model = None,
    contender: Annotated[str, typer.Option(help="The contender to compare with plain: blend or lmcache.")] = "blend",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Selection policy of the blend, POLICY[:RATIO][@LAYER]. [default: chunk_head:0.05]"),
    ] = None,
    num_requests: Annotated[int, typer.Option("--requests", min=5, help="Number of requests.")] = 300,
    num_chunks: Annotated[int, typer.Option("--chunks", min=1, help="Number of chunks that come again.")] = 200,
    per_request: Annotated[int, typer.Option(min=1, help="Chunks of each request.")] = 8,
    new_per_request: Annotated[int, typer.Option(min=0, help="Number of these that come only once.")] = 1,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each chunk.")] = 256,
    zipf: Annotated[float, typer.Option(min=0, help="How uneven the chunks' popularity is; 0: all equal.")] = 1.0,
    store_gb: Annotated[float, typer.Option(min=0.1, help="Memory for chunks, in GiB.")] = 0.4,
    dtype: OwnDtype = None,
    timeout_s: TimeLimit = 900.0,
    seed: Seed = 0,
    output: ResultFile = Path("results/sustained.json"),
    as_json: AsJson = False,
) -> None:
    """Measure whether a gain lasts: many requests over more chunks than the store has room for, some of them new.

    Servers are started for it, and stopped at the end.
    """
    from kvarena.bench.prompts import Workload
    from kvarena.bench.servers import Servers
    from kvarena.bench.sustained import SustainedPrompts, SustainedWorkload, run, show_rows
    from kvarena.bench.ttft import Bench
    from kvarena.bench.variants import Variant
    from kvarena.panels.panel import REFERENCE

    console = console_for(as_json)
    with explained(output):
        workload = SustainedWorkload(
            num_requests, num_chunks, per_request, new_per_request, chunk_tokens, zipf=zipf, seed=seed
        )
        policies = read_policies(policy or ["chunk_head:0.05"], "blend")
        model = model or (None if shape else "town")
        wanted = Servers(
            model, shape, (), timeout_s, store_gb=store_gb, with_hf=False, dtype=dtype, contender=contender
        )
        with wanted.found(workload.longest_tokens, console) as contenders:
            found = Bench(contenders, policies, Workload())
            variants = [*found.policies.get(contender, [Variant(contender)]), Variant(REFERENCE)]
            prompts = SustainedPrompts(found.vocabulary, workload)
            with progress(len(variants) * num_requests, console) as advance:
                rows = run(contenders, variants, prompts, num_requests, advance)
    settings = {"benchmark": "sustained", "separator": found.separator, **wanted.settings(), **vars(workload)}
    save_and_tell(output, settings, rows, as_json, console, show_rows)
    if any(row["num_failed"] for row in rows):
        raise typer.Exit(1)


@app.command()
def device(
    shapes: Annotated[str, typer.Option(help="Of 180m, 500m, 1b, 8b; separated by commas.")] = "1b,8b",
    context_tokens: ContextTokens = "4000,8000,16000",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="POLICY[:RATIO][@LAYER]; repeatable. [default: none, and all others at 5 and 15 %]"),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Tokens of each chunk.")] = 512,
    num_repeats: Repetitions = 5,
    dtype: Annotated[str, typer.Option(help="Data type of weights and KV.")] = "bfloat16",
    on_device: Annotated[str, typer.Option("--device", help="cuda, cpu, or auto: a GPU if there is one.")] = "auto",
    seed: Seed = 0,
    output: ResultFile = Path("results/device.json"),
    as_json: AsJson = False,
) -> None:
    """Measure what blending gains on this machine's GPU, without servers and without vLLM: random weights, full prefill
    with PyTorch's attention beside it, and the floor beside each time.

    Checks first that ratio 1 gives the logits of full prefill, for two families.
    """
    import tempfile

    from kvarena.bench import device as bench
    from kvarena.bench.results import save_results
    from kvarena.home import project_root
    from kvarena.model import SHIPPED_MODELS, TOWN

    console = console_for(as_json)
    with explained(output):
        workload = bench.DeviceWorkload(
            shapes=words(shapes),
            context_tokens=integers(context_tokens),
            variants=tuple(read_policies(policy or bench.default_policies(), "blend")),
            chunk_tokens=chunk_tokens,
            num_repeats=num_repeats,
            dtype=dtype,
            device=on_device,
            seed=seed,
        )
        rows: list[Row] = []
        tokenizer_from = project_root() / SHIPPED_MODELS[TOWN]
        with tempfile.TemporaryDirectory() as folder, progress(workload.num_steps, console) as advance:
            for row in bench.run(workload, Path(folder), tokenizer_from, advance):
                rows.append(row)
                save_results(output, bench.settings(workload), rows)
    settings = bench.settings(workload)
    save_and_tell(output, settings, rows, as_json, console, bench.show_rows)


@app.command()
def prefix(
    url: Annotated[
        str | None, typer.Option(help="A prefix contender's address. [default: an engine in this process]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without --url: a local folder or a hub name. [default: the town model]")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Without --url: a model of this size with random weights: 180m, 500m or 1b.")
    ] = None,
    context_tokens: Annotated[str, typer.Option(help="Lengths of the shared prefix, separated by commas.")] = (
        "470,1000,4000"
    ),
    levels: Annotated[
        str, typer.Option(help="Which levels of caching, separated by commas.")
    ] = "no KV cache,KV cache,prefix cache",
    num_requests: Repetitions = 3,
    max_new_tokens: AnswerTokens = 8,
    cache_gb: Annotated[float, typer.Option(min=0, help="Without --url: memory for prefixes, in GiB.")] = 2.0,
    storage: Annotated[str, typer.Option(help="Without --url: cpu or device.")] = "cpu",
    seed: Seed = 0,
    output: PlottedFile = Path("results/prefix.json"),
    as_json: AsJson = False,
) -> None:
    """Measure what each level of caching gains (none, a KV cache, a prefix cache) on cold prompts, repeated prompts
    and new questions."""
    from kvarena.bench.prefix import PrefixWorkload, find_target, run, show_rows

    console = console_for(as_json)
    with explained(output):
        workload = PrefixWorkload(
            context_tokens=integers(context_tokens),
            levels=words(levels),
            num_requests=num_requests,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        target, described = find_target(url, model, shape, cache_gb, storage)
        with progress(workload.num_steps, console) as advance:
            rows = run(target, workload, advance)
    settings = {"benchmark": "prefix", **described, **vars(workload)}
    save_and_tell(output, settings, rows, as_json, console, show_rows)


@app.command()
def tasks(
    num_tasks: Annotated[str, typer.Option(help="How many tasks are kept, separated by commas.")] = "1000,10000,100000",
    embedding_dim: Annotated[int, typer.Option(min=1, help="Size of a task's embedding.")] = 4096,
    num_queries: Annotated[int, typer.Option(min=1, help="Searches for each number of tasks.")] = 200,
    similarity: Annotated[float, typer.Option(help="Cosine of a query and the task it is made from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the embeddings.")] = 0,
    output: ResultFile = Path("results/tasks.json"),
    as_json: AsJson = False,
) -> None:
    """Measure how long the search for a similar task takes, and how often it finds one of the query's cluster."""
    from kvarena.bench.tasks import TaskSearchWorkload, run, show_rows

    console = console_for(as_json)
    with explained(output):
        workload = TaskSearchWorkload(integers(num_tasks), embedding_dim, num_queries, similarity, seed)
        with progress(workload.num_steps, console) as advance:
            rows = run(workload, advance)
    settings = {"benchmark": "tasks", **vars(workload)}
    save_and_tell(output, settings, rows, as_json, console, show_rows)


@app.command()
def decode(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI server of the same model to measure too, such as plain vLLM.")
    ] = None,
    model: Model = None,
    shape: Shape = None,
    context_tokens: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "128,1024",
    num_requests: Repetitions = 5,
    max_new_tokens: AnswerTokens = 33,
    seed: Seed = 0,
    output: ResultFile = Path("results/decode.json"),
    as_json: AsJson = False,
) -> None:
    """Time per output token: the PyTorch engine, Hugging Face generate, and a server if one is named."""
    from kvarena.bench import prefix as bench
    from kvarena.bench.shapes import model_folder
    from kvarena.stack.settings import shown_api_key

    console = console_for(as_json)
    with explained(output):
        workload = bench.DecodeWorkload(integers(context_tokens), max_new_tokens, num_requests, seed)
        contenders = {url: bench.server_decode(url, shown_api_key())} if url else {}
        folder = model_folder(model, shape)
        engine = bench.open_engine(folder, model, shape)
        reference = bench.generate_decode(folder, engine.model, random_weights=shape is not None)
        contenders |= {bench.ENGINE: bench.engine_decode(engine), bench.GENERATE: reference}
        with progress(workload.num_steps, console) as advance:
            rows = bench.run_decode(contenders, engine.model.vocab_size, workload, advance)
    settings = {"benchmark": "decode", "model": engine.model_name, "url": url, **vars(workload)}
    save_and_tell(output, settings, rows, as_json, console, bench.show_decode_rows)


def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes under load, after a short rehearsal.")] = 10.0,
    streams: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 32,
    faults: Annotated[
        str,
        typer.Option(
            help="Faults to inject: all, none, or some of kill-server, kill-engine (of a vLLM server), kill, "
            "freeze, restart, clear, fill (of LMCache), separated by commas. With --target it is none."
        ),
    ] = "all",
    target: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL of a server elsewhere, one of them called plain; repeatable. [default: the stack]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --target: folder of the documents. [default: the town's notes]")
    ] = None,
    prompts: Annotated[int, typer.Option(min=7, help="Different prompts.")] = 60,
    tie_margin: Annotated[
        float,
        typer.Option(min=0, help="Tokens whose logits differ by less than this count as tied."),
    ] = 0.25,
    timeout_s: Annotated[float, typer.Option(min=1, help="A request that takes longer counts as hung.")] = 180.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts, streams and faults.")] = 0,
    output: ResultFile = Path("results/soak.json"),
    as_json: AsJson = False,
) -> None:
    """Ask the running stack's vLLM servers many things at once while parts of it die, hang and fill up, and check that
    answers stay right, nothing hangs, nothing leaks and all counts add up.

    Exit status: 0 when all checks hold, 1 when one doesn't or after an error.
    """
    import asyncio

    from kvarena.bench.soak.campaign import Soak, of_stack, of_targets, show_outcome
    from kvarena.bench.soak.faults import NO_FAULTS, read_faults
    from kvarena.client import ClientError

    console = console_for(as_json)
    with explained(output):
        kinds = read_faults(NO_FAULTS if target else faults)
        servers, documents, stack = of_targets(target, data) if target else of_stack(bool(kinds), console)
        run = Soak(
            servers=servers,
            documents=documents,
            stack=stack,
            faults=kinds,
            seconds=60 * minutes,
            num_streams=streams,
            num_prompts=prompts,
            tie_margin=tie_margin,
            timeout_s=timeout_s,
            seed=seed,
        )
        with progress(run.num_steps, console, "soaking") as advance:
            try:
                outcome = asyncio.run(run.run(advance))
            except ClientError as error:
                raise ValueError(str(error)) from error
    details: dict[str, Any] = {
        "checks": [vars(check) for check in outcome.checks],
        "faults": [vars(struck) for struck in outcome.struck],
        "findings": outcome.findings,
    }

    def show(rows: Sequence[Row], console: Console) -> None:
        show_outcome(outcome, console)

    save_and_tell(output, run.settings(), outcome.rows, as_json, console, show, **details)
    raise typer.Exit(1 if outcome.failed else 0)


def report(
    results: Annotated[
        list[str] | None,
        typer.Argument(help=f"Result files, folders of them, or patterns. [default: {DEFAULT_PATTERN}]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page.")] = Path("results/report.html"),
) -> None:
    """Make one HTML page from result files: speed, quality, where the time goes, settings, tables to copy."""
    from kvarena.bench.report import read_files, render

    console = console_for(False)
    with explained():
        files = read_files(results or [DEFAULT_PATTERN])
        count = f"{len(files)} result file{'s' * (len(files) != 1)}"
        with console.status(f"Drawing {count} ..."):
            page = render(files)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    console.print(f"The report of {count} is in {output}.", soft_wrap=True, markup=False)
