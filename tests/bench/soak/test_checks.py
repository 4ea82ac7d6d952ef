"""What a run compares answers by, and how it sees that something is left behind."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.bench.soak.checks import Resources
from kvarena.bench.soak.faults import FAULTS, read_faults
from kvarena.bench.soak.prompts import KINDS, PromptMaker
from kvarena.bench.soak.streams import Comparison, Reference, compared
from kvarena.client import StreamedAnswer
from kvarena.home import INSTANCE_VARIABLE, SERVICE_VARIABLE, Home

HOARDER = """
import sys, threading, time
files = [open("/dev/null") for _ in range(int(sys.argv[1]))]
for _ in range(int(sys.argv[2])):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
kept = [bytes(range(256)) * 64 for _ in range(int(sys.argv[3]) * 64)]
print("ready", flush=True)
time.sleep(60)
"""


def entry(token: str, logprob: float, **others: float) -> dict[str, Any]:
    top = [{"bytes": list(text.encode()), "logprob": value} for text, value in {token: logprob, **others}.items()]
    return {"token": token, "bytes": list(token.encode()), "logprob": logprob, "top_logprobs": top}


def answer(*entries: dict[str, Any], finish: str = "length") -> StreamedAnswer:
    return StreamedAnswer(0.0, finish_reason=finish, logprobs=list(entries))


def test_an_answer_is_equal_token_by_token_and_in_its_end() -> None:
    reference = Reference(200, [entry("a", -0.5), entry("b", -0.2)], "length")
    assert compared(answer(entry("a", -0.5), entry("b", -0.2)), reference, 0.01, True) == Comparison("equal", 0.0)
    assert (
        compared(answer(entry("a", -0.5), entry("b", -0.2), finish="stop"), reference, 0.01, True).verdict
        == "different"
    )
    assert compared(answer(entry("a", -0.5)), reference, 0.01, True).verdict == "different"
    assert compared(answer(entry("a", -0.5)), reference, 0.01, False).verdict == "equal", "given up after a token"
    found = compared(answer(entry("a", -0.503), entry("b", -0.2)), reference, 0.01, True)
    assert found.verdict == "equal"
    assert math.isclose(found.shift, 0.003)


def test_a_tie_is_what_both_sides_think_as_good_as_equally_likely() -> None:
    reference = Reference(200, [entry("a", -0.700, b=-0.705, c=-0.9)], "length")

    def verdict(own: dict[str, Any], tie_margin: float = 0.01) -> str:
        return compared(answer(own), reference, tie_margin, True).verdict

    assert verdict(entry("b", -0.7, a=-0.702)) == "tie"
    assert verdict(entry("b", -0.7, a=-0.702), 0.001) == "different"
    assert verdict(entry("b", -0.7, a=-0.8)) == "different", "this side is sure of its own"
    assert verdict(entry("b", -0.7)) == "different", "this side doesn't even think of the other's"
    assert verdict(entry("c", -0.7, a=-0.7)) == "different"
    assert verdict(entry("d", -0.7, a=-0.7)) == "different"


def test_the_seed_makes_the_prompts() -> None:
    def prompts(seed: int) -> list[object]:
        return list(PromptMaker(["one two three", "four five six"], "", " # ", 50, seed).prompts(2 * len(KINDS)))

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)
    with pytest.raises(ValueError, match="no documents"):
        PromptMaker([], "", "", 50, 0)


def test_faults_are_named() -> None:
    assert read_faults("none") == ()
    assert read_faults("all") == tuple(FAULTS)
    assert read_faults("kill, freeze") == ("kill", "freeze")
    with pytest.raises(ValueError, match="--faults is 'flood'; it is none, all, or some of kill-server, "):
        read_faults("flood")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def held_by(home: Home, *hoard: int) -> Resources:
    """What a service has that keeps so many files, threads and MiB."""
    environment = {**os.environ, INSTANCE_VARIABLE: str(home.path), SERVICE_VARIABLE: "hoarder"}
    command = [sys.executable, "-c", HOARDER, *map(str, hoard)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        found = Resources.of(home, "hoarder")
        process.kill()
    return found


@pytest.mark.parametrize(
    ("hoard", "what"),
    [((50, 0, 0), "descriptors"), ((0, 20, 0), "threads"), ((0, 0, 300), "memory MiB")],
)
def test_what_a_service_keeps_is_found(home: Home, hoard: tuple[int, int, int], what: str) -> None:
    before = held_by(home, 0, 0, 0)
    assert [check.what for check in held_by(home, *hoard).checks("hoarder", before) if not check.is_ok] == [what]
    assert all(check.is_ok for check in held_by(home, 3, 1, 10).checks("hoarder", before))
