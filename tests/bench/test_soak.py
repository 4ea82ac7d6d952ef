"""`kvarena soak` without faults: how answers are compared, what is left behind, real servers, the command."""

from __future__ import annotations

import asyncio
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarena.bench.soak import campaign
from kvarena.bench.soak.campaign import Resources, Soak, SoakServer
from kvarena.bench.soak.faults import FAULTS, read_faults
from kvarena.bench.soak.streams import KINDS, Comparison, PromptMaker, Reference, Target, compared
from kvarena.cli import app
from kvarena.client import AsyncClient, StreamedAnswer
from kvarena.documents import Documents, TextChunk
from kvarena.home import INSTANCE_VARIABLE, SERVICE_VARIABLE, Home, StackError
from support.prefix_engine import make_prefix
from support.real_server import serving
from support.tiny_models import random_text, save_tiny_model

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


pytestmark = pytest.mark.timeout(300)
RNG = random.Random(0)
DOCUMENTS = Documents(tuple(TextChunk(f"text {i}", random_text(RNG, 30)) for i in range(8)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_tiny_model(tmp_path_factory.mktemp("model"), seed=seed) for seed in (0, 1)]


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def server(running: ExitStack, name: str, folder: Path) -> SoakServer:
    return SoakServer(name, running.enter_context(serving(make_prefix(folder).engine)).url)


def test_servers_of_one_model_give_the_same_answers_and_one_of_another_is_found(
    running: ExitStack, folders: list[Path]
) -> None:
    names = {"plain": folders[0], "prefix": folders[0], "other": folders[1]}
    servers = [server(running, name, folder) for name, folder in names.items()]
    run = Soak(servers, DOCUMENTS, None, (), seconds=8.0, num_streams=6, num_prompts=14)
    outcome = asyncio.run(run.run(lambda: None))
    *same, other = outcome.rows
    for row in same:
        assert row["num_equal"] > 0
        assert row["num_refused"] > 0
        assert row["num_given_up"] > 0
        assert row["largest_logprob_shift"] < 1e-3
    (failed,) = outcome.failed
    assert (failed.what, failed.of) == ("answers different", "other")
    assert failed.found == other["num_different"] > 0
    assert outcome.findings
    assert all(finding.startswith("other, prompt") for finding in outcome.findings)


def test_reports_that_were_not_counted_are_found(running: ExitStack, folders: list[Path]) -> None:
    url = server(running, "prefix", folders[0]).url

    async def failed(report: dict[str, int]) -> list[str]:
        client = AsyncClient(url)
        target = Target("prefix", client, await client.describe())
        before = await campaign.look([target], Home.find(), None)
        target.reports.append((before.at_s, report))
        found = await campaign.counted(target, before)
        await client.aclose()
        return [check.what for check in found if not check.is_ok]

    parts = {"num_reused_tokens": 0, "num_recomputed_tokens": 0, "num_computed_tokens": 0}
    assert asyncio.run(failed({"num_prompt_tokens": 0, **parts})) == []
    assert asyncio.run(failed({"num_prompt_tokens": 9, **parts})) == ["reports whose parts aren't their prompt"]
    more = {**parts, "num_computed_tokens": 9}
    assert asyncio.run(failed({"num_prompt_tokens": 9, **more})) == ["num_computed_tokens in /metrics"]


def test_the_reference_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="answers are compared with those of plain"):
        Soak([SoakServer("blend", "http://127.0.0.1:1")], DOCUMENTS, None, (), seconds=1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--faults", "flood"), "--faults is 'flood'; it is none, all, or some of kill-server"),
        (("--target", "here"), "--target is 'here'; it is NAME=URL"),
        (("--target", "blend=127.0.0.1:1"), "answers are compared with those of plain"),
        (("--target", "plain=127.0.0.1:1"), "nothing answers at http://127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["soak", "--output", str(tmp_path / "soak.json"), *arguments])
    assert result.exit_code == 1
    assert said in result.stderr.replace("\n", " ")


def test_without_a_stack_and_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(app, ["soak", "--output", str(tmp_path / "soak.json")])
    assert isinstance(result.exception, StackError)
    assert "nothing is running" in str(result.exception)
