"""The server as a process of its own: it says where it is, logs one line for each request, and ends on SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support.request_lines import lines_of

TESTS = Path(__file__).parents[1]
PROGRAM = (
    "from support.scripted_engine import ScriptedEngine; "
    "from kvarena.server.app import create_app, serve; serve(create_app(ScriptedEngine()), port=0)"
)


@pytest.mark.slow
def test_a_process_serves_and_ends_quickly() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent / 'backend'}", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
            http.post("/v1/completions", json={"prompt": "say tea"}, headers={"x-request-id": "one"})
            request = {"prompt": "forever", "stream": True, "max_tokens": 4000}
            with http.stream("POST", "/v1/completions", json=request) as reply:
                streamed = reply.iter_lines()
                assert next(streamed).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                assert "shutting down" in "".join(streamed)
        out = process.stdout.read()
        assert process.wait(60) in (0, -signal.SIGTERM)
    lines = lines_of(out)
    assert [(line["status"], line["finish"]) for line in lines] == [(200, "stop"), (499, "abort")]
    assert (lines[0]["request_id"], lines[0]["id"], lines[0]["num_prompt_tokens"]) == ("one", "cmpl-one", 5)
    assert "Traceback" not in out
    assert "HTTP/1.1" not in out
