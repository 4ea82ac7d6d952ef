"""`docs/blend-notebook.ipynb`: its cells run, one after the other, and show what its text says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib import pyplot

from kvarena.home import project_root

NOTEBOOK = project_root() / "docs" / "blend-notebook.ipynb"
RIGHT = "Oakbank"


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What the cells leave behind."""
    pyplot.switch_backend("Agg")
    found: dict[str, Any] = {}
    for number, cell in enumerate(code_cells()):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), found)
    yield found
    found["model"].close()
    pyplot.close("all")


pytestmark = pytest.mark.filterwarnings("ignore:.*non-interactive")  # of pyplot.show()


def test_the_answers_are_those_it_tells_of(names: dict[str, Any]) -> None:
    assert names["right"] == RIGHT == names["asked"].answers[0]
    answers = names["answers"]
    assert answers["naive reuse"] != RIGHT
    assert answers["kv_deviation 15%, layer 1"] != RIGHT
    assert answers["kv_deviation 15%, layer 2"] == answers["kv_deviation 30%, layer 2"] == RIGHT


def test_the_chunks_come_from_the_store(names: dict[str, Any]) -> None:
    for report in names["reports"].values():
        assert (report.store_hits, report.store_misses, report.store_errors) == (2, 0, 0)


def test_a_blend_is_nearer_to_full_prefill_than_naive_reuse(names: dict[str, Any]) -> None:
    distance, kvs = names["distance_by_layer"], names["kvs"]
    naive = distance(kvs["naive reuse"])
    for layer in (1, 2, 3):
        blended = distance(kvs[f"kv_deviation 15%, layer {layer}"])
        assert (blended[1:] < naive[1:]).all()
        assert blended[:layer].max() < 1e-5


def test_lorenz_house_is_picked_at_layer_two_only(names: dict[str, Any]) -> None:
    word_of = names["model"].tokenizer.decode
    last_word = max(place for place in names["reused"].tolist() if word_of([names["ids"][place]]).strip() == "house")
    picked = {layer: names["picked"](f"kv_deviation 15%, layer {layer}") for layer in (1, 2)}
    assert [last_word in picked[layer] for layer in (1, 2)] == [False, True]


def test_its_outputs_are_saved_and_small() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    saved = [output for cell in code_cells() for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in code_cells())
    assert {output["output_type"] for output in saved} == {"stream", "display_data"}
    shown = "".join(text for output in saved for text in output.get("text", []))
    assert f"full prefill                     {RIGHT}" in shown
    assert "\x1b[30;43mhouse\x1b[0m" in shown
