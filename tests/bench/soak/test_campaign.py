"""A run without faults over real servers, two of one model and one of another; reports that aren't what was counted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvarena.bench.soak import checks
from kvarena.bench.soak.campaign import Soak, SoakServer
from kvarena.bench.soak.streams import Target
from kvarena.client import AsyncClient
from kvarena.documents import Documents, TextChunk
from kvarena.home import Home
from support.prefix_engine import make_prefix
from support.real_server import serving
from support.tiny_models import random_text, save_tiny_model

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
        before = await checks.look([target], Home.find(), None)
        target.reports.append((before.at_s, report))
        found = await checks.counted(target, before)
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
