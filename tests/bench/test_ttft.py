"""`kvarena bench ttft`: rows from given times, and the command over running servers and those that it starts."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvarena.bench import servers
from kvarena.bench.measure import Reuse
from kvarena.bench.prompts import FIXED_OPENING_TOKENS, Cell
from kvarena.bench.ttft import Burst, Contender, Measured, Timed, cell_rows, show_rows, show_warnings
from kvarena.bench.variants import Variant
from kvarena.cli import app
from kvarena.home import INSTANCE_VARIABLE, Home
from kvarena.stack.processes import processes_of
from kvarena.stack.record import Record
from kvarena.stack.service import ProcessInfo, Service
from support.real_server import RealServer, serving
from support.running_stack import Stack
from support.scripted_engine import ScriptedEngine
from support.tiny_models import save_tiny_model

PLAIN, BLEND, OTHER = Variant("plain"), Variant("blend", "kv_deviation", 0.15), Variant("mine")
CELL = Cell(1000, "warm", 1)


def timed(ttft_s: float, *, sent_s: float = 0.0, num_tokens: int = 5, **more: Any) -> Timed:
    """Tokens after the first take 0.1 s each."""
    return Timed(sent_s, sent_s + ttft_s, sent_s + ttft_s + 0.1 * (num_tokens - 1), num_tokens, **more)


def rows_of(**bursts: list[Burst]) -> list[dict[str, Any]]:
    variants = {"plain": PLAIN, "blend": BLEND, "mine": OTHER}
    measured = [Measured(variants[name], name != "mine", found) for name, found in bursts.items()]
    return cell_rows(CELL, measured)


def test_ratios_are_taken_prompt_by_prompt() -> None:
    """Each pair is 10, 2 and 4 times; the ratio of the medians would be 5."""
    plain = [Burst([timed(ttft)]) for ttft in (1.0, 2.0, 8.0)]
    blend = [Burst([timed(ttft)]) for ttft in (0.1, 1.0, 2.0)]
    first, second = rows_of(plain=plain, blend=blend)
    assert second["speedup_vs_plain"] == {"median": 4.0, "low": 2.0, "high": 10.0}
    assert first["speedup_vs_plain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["ttft_ms"]["median"] == 1000
    assert second["tpot_ms"] == {"median": 100.0, "p95": 100.0}
    assert second["e2e_ms"]["median"] == 1400


def test_the_interval_of_a_median_leaves_single_outliers_out_once_there_are_enough_pairs() -> None:
    """With six pairs it is all of them, with more it isn't; five can't say."""
    plain = [Burst([timed(1.0)]) for _ in range(12)]
    blend = [Burst([timed(1 / speedup)]) for speedup in (2, 2.2, 2.1, 2.3, 1.9, 0.1, 2, 2.2, 2.1, 2.3, 1.9, 9)]
    for num_pairs, interval in ((5, None), (6, {"low": 0.1, "high": 2.3}), (12, {"low": 1.9, "high": 2.3})):
        _, row = rows_of(plain=plain[:num_pairs], blend=blend[:num_pairs])
        assert row["speedup_interval"] == interval
    assert rows_of(blend=blend)[0]["speedup_interval"] is None


def test_throughput_is_that_of_whole_bursts() -> None:
    """Two requests in 2.4 s and in 0.9 s, of which the second was sent 0.1 s later."""
    plain = [Burst([timed(1.0), timed(2.0)])]
    blend = [Burst([timed(0.2), timed(0.4, sent_s=0.1)])]
    first, second = rows_of(plain=plain, blend=blend)
    assert first["requests_per_s"]["median"] == pytest.approx(2 / 2.4, abs=1e-3)
    assert second["throughput_vs_plain"]["median"] == pytest.approx(2.4 / 0.9, abs=1e-3)
    assert (second["num_requests"], second["num_failed"]) == (2, 0)


def test_a_failed_request_is_counted_and_its_pair_left_out() -> None:
    plain = [Burst([timed(1.0)]), Burst([timed(1.0)])]
    blend = [Burst(["out of memory"]), Burst([timed(0.25)])]
    _, row = rows_of(plain=plain, blend=blend)
    assert (row["num_requests"], row["num_failed"], row["failure"]) == (2, 1, "out of memory")
    assert row["speedup_vs_plain"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert row["requests_per_s"]["median"] == pytest.approx(1 / 0.65, abs=1e-3)
    only = rows_of(plain=[Burst([timed(1.0)])], blend=[Burst(["gone"])])[1]
    assert [only[name] for name in ("ttft_ms", "speedup_vs_plain", "throughput_vs_plain", "stages_ms")] == [None] * 4


def test_shares_of_the_prompt_add_up_and_stages_are_the_reports() -> None:
    report = {
        "store_hits": 3,
        "store_misses": 1,
        "fetch_ms": 5.0,
        "select_ms": 20.0,
        "blend_ms": 30.0,
        "max_ttft_ms": 500.0,
        "ratio": 0.1,
    }
    answer = timed(0.1, reuse=Reuse(1000, 700, 100), report=report)
    row = rows_of(blend=[Burst([answer], before_bytes=5, peak_bytes=9), Burst([answer], 7, 8)])[0]
    assert (row["reused_ratio"], row["recomputed_ratio"], row["computed_ratio"]) == (0.7, 0.1, 0.2)
    assert row["stages_ms"] == {"fetch": 5.0, "select": 20.0, "prefill": 70.0, "decode": 400.0}
    assert (row["idle_rss_bytes"], row["peak_rss_bytes"]) == (5, 9)
    assert (row["num_store_hits"], row["num_store_misses"]) == (6, 2)
    assert row["speedup_vs_plain"] is None, "nothing to compare with"


def test_a_contender_that_does_not_blend_has_no_policy() -> None:
    row = rows_of(plain=[Burst([timed(0.1, num_tokens=1)])])[0]
    assert (row["policy"], row["ratio"], row["store"], row["tpot_ms"]) == (None, None, "warm", None)
    assert row["stages_ms"] == {"prefill": 100.0, "decode": 0.0}
    assert row["reused_ratio"] is None


def test_what_a_strangers_store_holds_is_unknown() -> None:
    row = rows_of(mine=[Burst([timed(0.1)])])[0]
    assert (row["store"], row["prompts"]) == ("unknown", "warm")


def test_the_table_and_what_not_to_believe() -> None:
    missed = {"store_hits": 2, "store_misses": 2, "blend_ms": 1.0}
    answers: list[Timed | str] = [timed(0.1, reuse=Reuse(100, 90), report=missed), "no [memory]"]
    measured = [Measured(PLAIN, True, [Burst([timed(1.0), timed(1.0)])]), Measured(BLEND, True, [Burst(answers)])]
    rows = cell_rows(CELL, measured, num_known_chunks=3)
    console = Console(file=io.StringIO(), width=200)
    show_rows(rows, console)
    show_warnings(rows, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10.00 (10.00-10.00)" in shown
    assert "1 of 2 requests failed: no [memory]" in shown
    assert "not in the store any more in 1 rows, the first: blend kv_deviation 15 %, warm, 1,000 tokens" in shown


SHORT = ["--context-tokens", "64,100", "--chunk-tokens", "32", "--repeats", "2", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def real() -> Iterator[RealServer[ScriptedEngine]]:
    with serving(ScriptedEngine()) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path / "home"))


def arguments(server: RealServer[ScriptedEngine], model: Path, output: Path, *more: str) -> list[str]:
    targets = [word for name in ("plain", "mine") for word in ("--target", f"{name}={server.url}")]
    return ["bench", "ttft", *targets, "--tokenizer", str(model), *SHORT, "--output", str(output), *more]


def test_servers_that_run_already(real: RealServer[ScriptedEngine], model: Path, tmp_path: Path) -> None:
    real.engine.requests.clear()
    output = tmp_path / "new" / "x.json"
    result = CliRunner().invoke(app, arguments(real, model, output, "--state", "warm,cold", "--concurrency", "1,2"))
    assert result.exit_code == 0, result.output
    saved = json.loads(output.read_text())
    assert {"settings", "versions", "machine", "rows"} == set(saved)
    assert (saved["settings"]["benchmark"], saved["settings"]["is_interrupted"]) == ("ttft", False)
    cells = [(row["context_tokens"], row["prompts"], row["concurrency"]) for row in saved["rows"][::2]]
    assert cells == [(c, s, n) for c in (64, 100) for s in ("warm", "cold") for n in (1, 2)]
    for row in saved["rows"]:
        assert (row["store"], row["policy"], row["num_failed"]) == ("unknown", None, 0)
        assert row["num_requests"] == 2 * row["concurrency"]
        assert row["ttft_ms"]["median"] <= row["e2e_ms"]["median"]
        assert row["speedup_vs_plain"]["low"] > 0
        assert row["reused_ratio"] == pytest.approx(0.5, abs=0.01), "as this engine says"
    lengths = [len(request.prompt) for request in real.engine.requests]
    assert len(lengths) == 2 * (2 + 2 * 2 * (1 + 2) * 2), "contexts: warm-ups, then contenders, states, both bursts"
    assert len(set(lengths)) == 2


def test_contenders_get_the_same_prompts_in_turn(
    real: RealServer[ScriptedEngine], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    ask = Contender.ask_at_once

    def noted(self: Contender, prompts: Sequence[Sequence[int]], *more: Any) -> Burst:
        asked.append((self.name, prompts))
        return ask(self, prompts, *more)

    monkeypatch.setattr(Contender, "ask_at_once", noted)
    result = CliRunner().invoke(app, arguments(real, model, tmp_path / "x.json", "--state", "none"))
    assert result.exit_code == 0, result.output
    one_length = asked[: len(asked) // 2]
    assert [name for name, _ in one_length] == ["plain", "mine", "plain", "mine", "mine", "plain"]
    measured = [prompts for _, prompts in one_length[2:]]
    assert measured[0] == measured[1] != measured[2] == measured[3]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C instead of what is asked at this place in the order."""
    ask, num_asked = Contender.ask_at_once, 0

    def until_interrupted(self: Contender, *given: Any) -> Burst:
        nonlocal num_asked
        num_asked += 1
        if num_asked == number:
            raise KeyboardInterrupt
        return ask(self, *given)

    monkeypatch.setattr(Contender, "ask_at_once", until_interrupted)


def test_an_interrupt_saves_what_came_in(
    real: RealServer[ScriptedEngine], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 10)
    output = tmp_path / "x.json"
    result = CliRunner().invoke(app, arguments(real, model, output, "--state", "cold"))
    assert result.exit_code == 130
    assert "Interrupted" in result.output
    saved = json.loads(output.read_text())
    assert saved["settings"]["is_interrupted"]
    assert [row["context_tokens"] for row in saved["rows"]] == [64, 64]


def test_of_an_interrupted_length_what_all_were_asked_is_kept(
    real: RealServer[ScriptedEngine], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the only length two warm-ups, one whole round of both, and one request of the next round."""
    interrupt_at(monkeypatch, 6)
    output = tmp_path / "x.json"
    one_length = ["--context-tokens", "64", "--repeats", "5", "--state", "warm"]
    result = CliRunner().invoke(app, arguments(real, model, output, *one_length))
    assert result.exit_code == 130
    rows = json.loads(output.read_text())["rows"]
    assert [(row["contender"], row["num_requests"]) for row in rows] == [("plain", 1), ("mine", 1)]


def test_known_chunks_come_from_a_folder_of_documents(
    real: RealServer[ScriptedEngine], model: Path, tmp_path: Path
) -> None:
    real.engine.requests.clear()
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "one.txt").write_text("blue river market lamp " * 6)
    output = tmp_path / "x.json"
    more = ["--state", "warm", "--separator", " # # ", "--data", str(documents)]
    result = CliRunner().invoke(app, arguments(real, model, output, *more))
    assert result.exit_code == 0, result.output
    settings = json.loads(output.read_text())["settings"]
    assert settings["data"] == str(documents)
    assert 24 <= settings["num_document_tokens"] < 64, "fewer than the shortest context"
    for request in real.engine.requests:
        text = real.engine.tokenizer.decode(request.prompt)
        assert text.count(" # # ") > 2
        assert "blue river market lamp" in text
    (documents / "one.txt").unlink()
    result = CliRunner().invoke(app, arguments(real, model, tmp_path / "y.json", *more))
    assert result.exit_code == 1
    assert f"{documents} has no documents" in " ".join(result.output.split())


def test_failed_requests_are_an_exit_status(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    with serving(ScriptedEngine(max_model_len=160)) as server:
        longer = arguments(server, model, output, "--state", "cold", "--question-tokens", "1")
        refused = CliRunner().invoke(app, longer)
        assert refused.exit_code == 1
        assert "plain takes 160 tokens; the longest context with its question and answer has up to 168" in " ".join(
            refused.output.split()
        )
        assert not output.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--target", "plain"], "--target is 'plain'; it is NAME=URL"),
        (["--state", "lukewarm"], "it is one of warm, half, cold, none"),
        (["--store", "disk"], "--store is 'disk'; it is one of lmcache, memory"),
        (["--context-tokens", "many"], "'many' is no list of whole numbers"),
        (["--shape", "7b"], "no shape '7b'; there are 180m, 500m, 1b"),
        (["--shape", "180m", "--model", "x"], "--model and --shape exclude each other"),
        (["--model", "x", "--policy", "best"], "policy must be one of"),
    ],
)
def test_bad_command_lines(given: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "ttft", *given, "--output", str(tmp_path / "x.json")])
    assert result.exit_code == 1
    assert says in result.output
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(("output", "says"), [("", "is a folder; name a file"), ("file/x.json", "error: ")])
def test_where_no_result_can_be_written_nothing_is_measured(output: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["bench", "ttft", "--target", "there=nowhere", "--output", str(tmp_path / output)])
    assert result.exit_code == 1
    assert says in result.output
    assert "there" not in result.output
    assert not list(tmp_path.glob("*.part"))


def test_names_and_addresses(real: RealServer[ScriptedEngine], model: Path, tmp_path: Path) -> None:
    twice = arguments(real, model, tmp_path / "x.json", "--target", f"mine={real.url}")
    result = CliRunner().invoke(app, twice)
    assert result.exit_code == 1
    assert "two contenders have one name: plain, mine, mine" in result.output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"there=127.0.0.1:{free.getsockname()[1]}"
    result = CliRunner().invoke(app, ["bench", "ttft", "--target", nobody])
    assert result.exit_code == 1
    assert "there: no OpenAI server answers at" in result.output


def test_the_running_stack_is_measured_when_nothing_else_is_asked_for(
    real: RealServer[ScriptedEngine], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack whose `plain` is this server; its page is no contender."""

    class Supervisor:
        def processes(self) -> dict[str, ProcessInfo]:
            return {"plain": ProcessInfo("RUNNING", os.getpid(), 1.0)}

    plain = Service("plain", "", ("x", "--dtype", "float32", "--port", "1"), 0, real.url, "", "", {}, "")
    record = Record((plain, replace(plain, name="page")), "", "", "tiny")
    monkeypatch.setattr(servers, "running_supervisor", lambda home: (record, Supervisor()))
    output = tmp_path / "x.json"
    given = ["--tokenizer", str(model), *SHORT, "--state", "none", "--output", str(output)]
    result = CliRunner().invoke(app, ["bench", "ttft", *given])
    assert result.exit_code == 0, result.output
    saved = json.loads(output.read_text())
    assert saved["settings"]["has_prefix_caching"] is None
    assert saved["settings"]["contenders"]["plain"]["options"] == {"--dtype": "float32"}
    assert [(row["contender"], row["store"]) for row in saved["rows"]] == [("plain", "none")] * 2
    for row in saved["rows"]:
        assert row["peak_rss_bytes"] is None or row["peak_rss_bytes"] >= row["idle_rss_bytes"] > 10**7


@pytest.mark.slow
def test_servers_that_are_started_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The town model: what was known, reused and computed is what the states say, and nothing is left running."""
    monkeypatch.setenv("CXX", "/no/compiler")  # a first compilation takes longer than all the rest
    stack, output = Stack(tmp_path / "home"), tmp_path / "x.json"
    contexts = ["--context-tokens", "384", "--chunk-tokens", "128", "--concurrency", "1,2", "--repeats", "1"]
    policies = ["--policy", "kv_deviation:0.15@2", "--policy", "none"]
    done = stack.command("bench", "ttft", *contexts, *policies, "--output", str(output), timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not processes_of(Home(tmp_path / "home" / "bench" / "ttft"))
    saved = json.loads(output.read_text())
    assert saved["settings"]["has_prefix_caching"] is False
    assert "--no-enable-prefix-caching" in saved["settings"]["contenders"]["plain"]["options"]
    rows = {(row["contender"], row["policy"], row["prompts"], row["concurrency"]): row for row in saved["rows"]}
    assert len(rows) == len(saved["rows"]) == 2 * (3 * 4 + 3)
    around = rows["plain", None, "none", 1]["num_prompt_tokens"] - 384
    for (contender, policy, state, concurrency), row in rows.items():
        assert (row["num_failed"], row["store"], row["num_requests"]) == (0, state, concurrency)
        assert row["ttft_ms"]["median"] <= row["e2e_ms"]["median"]
        assert row["tpot_ms"]["median"] > 0
        assert row["peak_rss_bytes"] is None or row["peak_rss_bytes"] > 10**8
        if policy is None:
            # Without a chunk a blend may know how all prompts begin, and nothing else.
            shared = FIXED_OPENING_TOKENS / row["num_prompt_tokens"] if contender == "blend" else 0
            assert 0 <= 1 - row["computed_ratio"] <= shared + 1e-3, (contender, state)
            continue
        known = {"warm": 3, "half": 1, "cold": 0}[state]
        assert row["num_known_chunks"] == known
        openings = row["num_store_hits"] - known * concurrency
        assert 0 <= openings <= concurrency if state == "cold" else openings == concurrency, "all prompts begin alike"
        assert row["num_store_hits"] + row["num_store_misses"] == 4 * concurrency
        num_computed = around + 384 - 128 * known - FIXED_OPENING_TOKENS * openings / concurrency
        assert row["computed_ratio"] == pytest.approx(num_computed / (384 + around), abs=3e-3)
        assert row["recomputed_ratio"] == 0 or policy != "none"
        assert row["recomputed_ratio"] > 0 or policy == "none" or not known
        assert {"fetch", "write", "recompute", "prefill", "decode"} <= set(row["stages_ms"])
    assert not [p for p in psutil.process_iter() if _belongs_to(p, tmp_path)]


def _belongs_to(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get(INSTANCE_VARIABLE, "").startswith(str(folder))
    except psutil.Error:
        return False
