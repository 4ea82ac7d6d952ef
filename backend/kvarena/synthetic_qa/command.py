"""The command `kvarena worlds`: makes up a town with as many questions as wanted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer


def worlds(
    output: Annotated[Path, typer.Option(help="Folder for the chunk files and questions.jsonl.")],
    seed: Annotated[int, typer.Option(help="The same settings and seed make the same files.")] = 1,
    num_chunks: Annotated[int, typer.Option(min=2, max=5_000, help="How many chunk files.")] = 16,
    chunk_tokens: Annotated[
        int, typer.Option(min=20, max=4_000, help="Words and punctuation marks per chunk, within 30 %.")
    ] = 100,
    num_questions: Annotated[int, typer.Option(min=0, max=100_000, help="How many questions.")] = 120,
    context_chunks: Annotated[
        int | None, typer.Option(min=2, help="Chunks in the context of a question. [default: 7, or all if fewer]")
    ] = None,
    links: Annotated[
        str | None,
        typer.Option(
            help="What later chunks refer back to: person, shop, street, day, nickname. [default: person, shop, street]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that isn't empty.")] = False,
) -> None:
    """Write a made-up town: chunk files, a system prompt, and questions with gold answers."""
    from rich.console import Console

    from kvarena.synthetic_qa.questions import write_folder, write_questions
    from kvarena.synthetic_qa.town import DEFAULT_LINKS, LINKS, TownShape, write_town

    folder = output.expanduser()
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file", param_hint="--output")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise typer.BadParameter(f"{folder} isn't empty; --force writes into it", param_hint="--output")
    size = context_chunks or min(7, num_chunks)
    if size > num_chunks:
        raise typer.BadParameter(f"{size} chunks of a town that has {num_chunks}", param_hint="--context-chunks")
    wanted = [link.strip() for link in links.split(",")] if links else list(DEFAULT_LINKS)
    if unknown := set(wanted) - set(LINKS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; choose of {', '.join(LINKS)}", param_hint="--links")
    shape = TownShape(num_chunks, chunk_tokens, links=tuple(link for link in LINKS if link in wanted))
    console = Console()
    rng = random.Random(seed)
    with console.status("Writing the town ..."):
        town = write_town(rng, shape)
    with console.status("Asking questions ..."):
        items = write_questions(town, rng, num_questions, size)
        write_folder(folder, town, items)
    console.print(f"{folder}: {len(town)} chunks, {len(items)} questions", soft_wrap=True)
    if len(items) < num_questions:
        console.print(
            f"This town has no more to ask than {len(items)} questions; more chunks have more.", soft_wrap=True
        )
