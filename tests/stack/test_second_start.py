"""Chunks survive the stack: a second start finds on the disk what the first one computed, until it is cleared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvarena.home import Home
from kvarena.stack.processes import stop_leftovers
from kvarena.synthetic_qa.facts import chunk_text
from support.running_stack import Stack, free_port_base
from support.salt_isolation import ask_over, assert_isolated
from support.towns import small_town

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """One that keeps chunks on the disk, which the tests' stacks otherwise don't."""
    monkeypatch.setenv("LMCACHE_L2", "")
    monkeypatch.setenv("LMCACHE_GB", "0.5")
    yield Stack(tmp_path / "home")
    stop_leftovers(Home(tmp_path / "home"))


def answer(stack: Stack, *arguments: str) -> dict[str, Any]:
    done = stack.command(*arguments, "--json", timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def start(stack: Stack) -> dict[str, Any]:
    """What came of filling the chunk cache, and the state of the disk, as `up` tells."""
    options = ("--contenders", "blend", "--model", "town", "--no-ui", "--port-base", str(free_port_base()))
    return answer(stack, "up", *options)


def stop(stack: Stack) -> None:
    assert stack.command("down").returncode == 0


def town_prompt(number: int) -> str:
    """Six chunks that no other prompt has, and a question."""
    return "<note>".join([*(chunk_text(chunk) for chunk in small_town(20_000 + number, 6, 80)), "Who?"])


def test_a_second_start_finds_what_the_first_one_computed(stack: Stack) -> None:
    """Under another salt nobody finds it, by what is called cached and by the time to the first token."""
    chunks = Home(stack.home).chunks
    first = start(stack)
    num_chunks = first["warm"]["num_chunks"]
    assert first["warm"]["num_warmed"] == num_chunks > 10
    second: dict[str, Any] = {}

    def ask(prompt: str, salt: str) -> int:
        with stack.client("blend") as http:  # wherever it runs now
            return ask_over(http, "town")(prompt, salt)

    def start_again() -> None:
        stop(stack)
        second.update(start(stack))

    assert_isolated(ask, town_prompt, num_rounds=16, restart=start_again)

    assert second["warm"]["num_already_there"] == num_chunks, second["warm"]
    on_disk = second["chunks_on_disk"]
    assert on_disk["folder"] == str(chunks)
    assert 0 < on_disk["size_bytes"] < on_disk["bound_bytes"] == 4 << 30

    cleared = answer(stack, "clear")
    assert cleared["memory"]
    assert cleared["folder_bytes"] > on_disk["size_bytes"], "what was asked since then is stored too"
    assert not list(chunks.glob("*.data"))
    stop(stack)
    assert answer(stack, "clear")["memory"] is False
