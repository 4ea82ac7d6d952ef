"""What the page imports: nothing in circles, for which import-linter doesn't look here, or beyond its requirements."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.bare_environment import ROOT, absent_modules, run_without

FRONTEND = Path(__file__).parents[2] / "frontend"


def imports_of(source: str) -> set[str]:
    """Modules that it imports anywhere, for type checking included."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def in_order(sources: dict[str, str]) -> list[str]:
    """The modules, each after those that it imports. Raises `CycleError` naming those of a circle."""
    graph = {name: imports_of(source) & sources.keys() for name, source in sources.items()}
    return list(TopologicalSorter(graph).static_order())


def test_no_cycles() -> None:
    ordered = in_order({path.stem: path.read_text() for path in FRONTEND.rglob("*.py")})
    assert ordered.index("state") < ordered.index("sidebar") < ordered.index("arena"), "imports are followed"


def test_a_cycle_is_seen() -> None:
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from chat import Turn\n"
    with pytest.raises(CycleError, match="chat"):
        in_order({"chat": "def turn():\n    import runs\n", "runs": hidden})


# -- where nothing else is installed -----------------------------------------------------------------------------------


START = """
from streamlit.testing.v1 import AppTest
page = AppTest.from_file("frontend/app.py", default_timeout=60).run()
assert not page.exception, page.exception
assert "Contenders" in [heading.value for heading in page.sidebar.subheader]
"""
OPEN_MEASURE = """
page.switch_page("views/measure.py").run()
assert not page.exception, page.exception
(said,) = page.warning
assert said.value.startswith("Measuring needs packages that are not installed beside this page: "), said.value
(install,) = page.code
assert install.value.startswith(f"{sys.executable} -m pip install "), install.value
assert not page.multiselect and not page.number_input and not page.text_input, "no form that can do nothing"
assert not [button for button in page.button if button.key == "measure-start"]
"""


@pytest.mark.timeout(120)
def test_the_page_starts_where_nothing_else_is_installed() -> None:
    lines = (ROOT / "frontend" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [".[ui]"]
    absent = absent_modules("ui")
    assert {"torch", "vllm", "transformers", "lmcache", "fastapi", "scipy", "matplotlib"} <= set(absent)
    run = run_without(absent, START + OPEN_MEASURE)
    assert run.returncode == 0, run.stderr
