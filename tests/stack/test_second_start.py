"""Chunks survive the stack: a second start finds on the disk what the first one computed, until it is cleared."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvarena.home import Home
from kvarena.stack.processes import stop_leftovers
from kvarena.stack.record import read_record
from kvarena.synthetic_qa.facts import chunk_text
from support.running_stack import KVARENA, free_port_base
from support.salt_isolation import ask_over, assert_isolated
from support.towns import small_town

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def stack_home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    stop_leftovers(home)


def kvarena(home: Home, *arguments: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "KVARENA_HOME": str(home.path),
        "CXX": "none",
        "LMCACHE_GB": "0.5",
        "LMCACHE_TIMEOUT_S": "10",
    }
    done = subprocess.run([KVARENA, *arguments, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def start(home: Home) -> dict[str, Any]:
    """What came of filling the chunk cache, and the state of the disk, as `up` tells."""
    options = ("--contenders", "blend", "--model", "town", "--no-ui", "--port-base", str(free_port_base()))
    return kvarena(home, "up", *options)


def stop(home: Home) -> None:
    environment = {**os.environ, "KVARENA_HOME": str(home.path)}
    subprocess.run([KVARENA, "down"], env=environment, check=True, capture_output=True)


class Blend:
    """Asks it under a salt, wherever it runs now."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def __call__(self, prompt: str, salt: str) -> int:
        record = read_record(self._home)
        service = record.service("blend") if record else None
        assert service
        with httpx.Client(base_url=service.address, timeout=60, trust_env=False) as http:
            return ask_over(http, "town")(prompt, salt)


def town_prompt(number: int) -> str:
    """Six chunks that no other prompt has, and a question."""
    return "<note>".join([*(chunk_text(chunk) for chunk in small_town(20_000 + number, 6, 80)), "Who?"])


def test_a_second_start_finds_what_the_first_one_computed(stack_home: Home) -> None:
    """Under another salt nobody finds it, by what is called cached and by the time to the first token."""
    first = start(stack_home)
    num_chunks = first["warm"]["num_chunks"]
    assert first["warm"]["num_warmed"] == num_chunks > 10
    second: dict[str, Any] = {}

    def start_again() -> None:
        stop(stack_home)
        second.update(start(stack_home))

    assert_isolated(Blend(stack_home), town_prompt, num_rounds=16, restart=start_again)

    assert second["warm"]["num_already_there"] == num_chunks, second["warm"]
    on_disk = second["chunks_on_disk"]
    assert on_disk["folder"] == str(stack_home.chunks)
    assert 0 < on_disk["size_bytes"] < on_disk["bound_bytes"] == 4 << 30

    cleared = kvarena(stack_home, "clear")
    assert cleared["memory"]
    assert cleared["folder_bytes"] > on_disk["size_bytes"], "what was asked since then is stored too"
    assert not list(stack_home.chunks.glob("*.data"))
    stop(stack_home)
    assert kvarena(stack_home, "clear")["memory"] is False
