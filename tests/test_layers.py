"""Who imports whom, as far as `lint-imports` can't see it: a contender that no contract names, and the page's modules,
which import each other by their bare names.
"""

from __future__ import annotations

import ast
import pkgutil
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvarena.contenders
from kvarena.home import project_root


def test_the_contract_of_independence_names_every_contender_in_a_folder() -> None:
    linter = tomllib.loads((project_root() / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (one for one in linter["contracts"] if one["id"] == "contenders")
    found = pkgutil.iter_modules(kvarena.contenders.__path__, "kvarena.contenders.")
    assert sorted(contract["modules"]) == sorted(module.name for module in found if module.ispkg)


def test_the_pages_modules_have_no_import_cycle() -> None:
    imports = imports_between(project_root() / "frontend")
    list(TopologicalSorter(imports).static_order())


def test_a_cycle_is_found_wherever_its_imports_stand(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    (tmp_path / "one.py").write_text("import json\nfrom views import two\n")
    (tmp_path / "views" / "two.py").write_text("def later():\n    from views.three import name\n")
    (tmp_path / "views" / "three.py").write_text("import one\n")
    imports = imports_between(tmp_path)
    assert imports == {"one": {"views.two"}, "views.two": {"views.three"}, "views.three": {"one"}}
    with pytest.raises(CycleError):
        TopologicalSorter(imports).prepare()


def imports_between(folder: Path) -> dict[str, set[str]]:
    """Which of a folder's modules each of them imports, those for type checking and in functions included."""
    paths = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    return {name: paths.keys() & set(_imported(ast.parse(path.read_text()))) for name, path in paths.items()}


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
