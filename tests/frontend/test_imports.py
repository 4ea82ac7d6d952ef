"""The page's modules import one another by bare names, which import-linter doesn't follow: none goes in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

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
