"""`kvarena bench tasks`: what it counts, and its file. Times are reported, not asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarena.bench.command import app
from kvarena.bench.tasks import TaskSearchWorkload


def test_near_tasks_are_found_and_far_ones_arent(tmp_path: Path) -> None:
    found = {}
    for similarity in (0.95, 0.1):
        output = tmp_path / f"{similarity}.json"
        sizes = ["--num-tasks", "40,200", "--embedding-dim", "256", "--num-queries", "30"]
        result = CliRunner().invoke(app, ["tasks", *sizes, "--similarity", str(similarity), "--output", str(output)])
        assert result.exit_code == 0, result.output
        rows = json.loads(output.read_text())["rows"]
        assert [row["num_tasks"] for row in rows] == [40, 200]
        assert all(row["lookup_ms"]["p95"] >= row["lookup_ms"]["median"] > 0 for row in rows)
        found[similarity] = [row["found_ratio"] for row in rows]
    assert found == {0.95: [1, 1], 0.1: [0, 0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_tasks": ()}, "a task"), ({"num_queries": 0}, "a query"), ({"similarity": 1.0}, "below 1, not 1.0")],
)
def test_bad_workloads_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSearchWorkload(**settings)  # type: ignore[arg-type]
