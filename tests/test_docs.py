"""The project's documents: links lead somewhere, and the files that GitHub reads are what it expects."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from kvarena.cli import app
from kvarena.home import project_root

ROOT = project_root()
DOCUMENTS = sorted(
    path
    for folder in (".", ".github", "backend", "deploy", "docs")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
SCHEMAS = {
    "vendor.citation-file-format": ["CITATION.cff"],
    "vendor.github-issue-forms": [
        ".github/ISSUE_TEMPLATE/bug_report.yml",
        ".github/ISSUE_TEMPLATE/feature_request.yml",
    ],
    "vendor.github-workflows": [".github/workflows/tests.yml"],
}


def links(document: Path) -> list[str]:
    text = CODE_SPAN.sub("", FENCED.sub("", document.read_text()))
    return [target for target in LINK.findall(text) if not re.match(r"https?:|mailto:", target)]


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for link in links(document):
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_of_docs_is_linked_from_the_readme_or_from_another_page() -> None:
    linked = {
        (document.parent / unquote(link).partition("#")[0]).resolve()
        for document in DOCUMENTS
        for link in links(document)
        if not link.startswith("#")
    }
    assert set((ROOT / "docs").glob("*.md")) <= linked


@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_github_reads_follows_its_schema(schema: str) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([str(tool), "--builtin-schema", schema, *SCHEMAS[schema]], cwd=ROOT, check=True)


def test_the_command_tells_the_version_that_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = CliRunner().invoke(app, ["--version"])
    assert (told.exit_code, told.output.strip()) == (0, project["version"])
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
