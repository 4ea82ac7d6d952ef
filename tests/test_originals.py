"""Every row of docs/originals.md, run: Python in one namespace, requests to a prefix server, all else in a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from uvicorn.importer import import_from_string

from kvarena.contenders.prefix.http import router
from support.prefix_engine import make_prefix
from support.real_server import serving
from support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
ROWS = re.findall(r"^\| .*? \| `(.+?)` \| .*\|$", (ROOT / "docs" / "originals.md").read_text(), re.MULTILINE)
COMMANDS = [row for row in ROWS if re.match(r"(python|kvarena|grep) ", row)]
REQUESTS = [row for row in ROWS if re.match(r"(GET|POST) /", row)]
SERVERS = [row for row in ROWS if row.startswith("uvicorn ")]
STATEMENTS = [row for row in ROWS if row not in COMMANDS + REQUESTS + SERVERS]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    engine = make_prefix(save_tiny_model(tmp_path_factory.mktemp("llama"))).engine
    with serving(engine, routers=[router]) as server, server.client() as client:
        yield client


def test_no_row_is_left_out() -> None:
    lines = (ROOT / "docs" / "originals.md").read_text().splitlines()
    assert len(ROWS) == sum(line.startswith("| `") for line in lines)


def test_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for statement in STATEMENTS:
        exec(statement, names)
    names["simllm"].close()


@pytest.mark.parametrize("request_line", REQUESTS)
def test_the_requests(http: httpx.Client, request_line: str) -> None:
    method, path, *body = request_line.split(" ", 2)
    reply = http.request(method, path, **({"json": json.loads(body[0])} if body else {}))
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands(http: httpx.Client, command: str) -> None:
    environment = os.environ | {"PATH": PATH, "URL": str(http.base_url)}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", SERVERS)
def test_the_servers(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What uvicorn reads in its command line, and the app that it would serve."""
    given = uvicorn.main.make_context("uvicorn", command.split()[1:]).params
    monkeypatch.syspath_prepend(ROOT / given["app_dir"])
    monkeypatch.setenv("MODEL", "town")
    monkeypatch.setenv("PREFIX_MIN_TOKENS", "5")
    with TestClient(import_from_string(given["app"])) as client:
        body = {"prompt": "What is machine learning?", "max_new_tokens": 4, "use_cache": True}
        assert client.post("/generate", json=body).json()["num_answer_tokens"] == 4
        assert client.post("/generate", json=body).json()["prefix_cache_hit"]
