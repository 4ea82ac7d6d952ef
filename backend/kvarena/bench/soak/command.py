"""`kvarena soak`: reads the options, shows progress, prints what was found and saves the result file.

Imported by the command line at its start: everything heavy is imported inside the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarena.bench.console import AsJson, ResultFile, console_for, explained, progress, save_and_tell

if TYPE_CHECKING:
    from rich.console import Console

    from kvarena.bench.soak.campaign import Outcome, SoakServer, Stack
    from kvarena.documents import Documents

DEFAULT_OUTPUT = Path("results/soak.json")


def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes under load, after a short rehearsal.")] = 10.0,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    faults: Annotated[
        str,
        typer.Option(
            help="What happens meanwhile: all, none, or some of kill-server, kill-engine (of a vLLM server), kill, "
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
    output: ResultFile = DEFAULT_OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Ask the running stack's vLLM servers many things at once while parts of it die, hang and fill up, and check that
    answers stay right, nothing hangs, nothing leaks and all counts add up.

    Exit status: 0 when all checks hold, 1 when one doesn't or after an error.
    """
    import asyncio

    from kvarena.bench.soak.campaign import Soak
    from kvarena.bench.soak.faults import NO_FAULTS, read_faults
    from kvarena.client import ClientError

    console = console_for(as_json)
    with explained(output):
        kinds = read_faults(NO_FAULTS if target else faults)
        servers, documents, stack = _targets(target, data) if target else _stack(bool(kinds), console)
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
        "checks": [check.to_json() for check in outcome.checks],
        "faults": [vars(struck) for struck in outcome.struck],
        "findings": outcome.findings,
    }
    save_and_tell(output, run.settings(), outcome.rows, as_json, console, lambda: _show(outcome, console), **details)
    raise typer.Exit(1 if outcome.failed else 0)


def _targets(targets: list[str], data: Path | None) -> tuple[list[SoakServer], Documents, None]:
    from kvarena.bench.soak.campaign import SoakServer
    from kvarena.documents import load_documents
    from kvarena.model import TOWN, find_model
    from kvarena.stack.settings import shown_api_key

    servers = []
    for target in targets:
        name, _, url = target.partition("=")
        if not name or not url:
            raise ValueError(f"--target is {target!r}; it is NAME=URL")
        servers.append(SoakServer(name, url if "://" in url else f"http://{url}", shown_api_key()))
    return servers, load_documents(data or find_model(TOWN, "cpu").data_dir), None


def _stack(has_faults: bool, console: Console) -> tuple[list[SoakServer], Documents, Stack | None]:
    from kvarena.bench.soak.campaign import SoakServer, Stack
    from kvarena.contenders.spec import contender_specs
    from kvarena.home import Home, StackError
    from kvarena.stack.chunk_cache import read_documents
    from kvarena.stack.settings import shown_api_key
    from kvarena.stack.supervisord import running_supervisor

    home = Home.find()
    record, runner = running_supervisor(home)
    if record is None or runner is None:
        raise StackError("nothing is running; start the stack with ./run-server.sh, or name servers with --target")
    if record.compose and has_faults:
        raise StackError("the stack runs in containers, whose processes can't be stopped from here; use --faults none")
    specs = contender_specs()
    servers = [
        SoakServer(service.name, service.address, shown_api_key())
        for service in record.services
        if service.name in specs and specs[service.name].is_vllm
    ]
    stack = None if record.compose else Stack(home, record, runner)
    return servers, read_documents(record, console), stack


def _show(outcome: Outcome, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="Answers", box=box.SIMPLE_HEAD, collapse_padding=True)
    names = dict.fromkeys(name for row in outcome.rows for name in row if name.startswith("num_"))
    for name in ("contender", *(name.removeprefix("num_").replace("_", " ") for name in names), "TTFT ms"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in outcome.rows:
        ttft = f"{row['ttft_ms']['median']:,.0f}" if row["ttft_ms"] else ""
        table.add_row(row["contender"], *(f"{row.get(name, 0):,}" for name in names), ttft)
    console.print(table)
    if outcome.struck:
        table = Table(title="Faults", box=box.SIMPLE_HEAD, collapse_padding=True)
        for name in ("after s", "service", "fault", "healthy after s"):
            table.add_column(name, justify="left" if name in ("service", "fault") else "right")
        for fault in outcome.struck:
            back = "" if fault.back_s is None else f"{fault.back_s - fault.at_s:.1f}"
            table.add_row(f"{fault.at_s:.0f}", fault.service, fault.kind, back)
        console.print(table)
    if outcome.failed:
        table = Table(title="What doesn't hold", box=box.SIMPLE_HEAD, collapse_padding=True)
        for name in ("service", "what", "found", "expected"):
            table.add_column(name, justify="right" if name == "found" else "left")
        for check in outcome.failed:
            table.add_row(check.of, check.what, f"{check.found:,.0f}", check.expected)
        console.print(table)
    for finding in outcome.findings:
        console.print(finding, markup=False, highlight=False, soft_wrap=True)
    num_ok = len(outcome.checks) - len(outcome.failed)
    console.print(f"{num_ok} of {len(outcome.checks)} checks hold.", highlight=False)
