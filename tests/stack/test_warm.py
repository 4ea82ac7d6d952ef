"""Warming: every chunk is sent once, between two separators, and counted by what the report says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from kvarena.client import ChunkOutcome, Unreachable
from kvarena.documents import TextChunk
from kvarena.stack.chunk_cache import warm
from kvarena.stack.render import show_warm_result
from kvarena.stack.service import StackError


class Blend(ThreadingHTTPServer):
    """Answers as the blend does: a chunk is a miss once and a hit from then on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.described: dict[str, Any] = {"separator": "<note>"}
        self.requests: list[dict[str, Any]] = []
        self.known: set[str] = set()
        self.api_key = ""
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.all_arrived = threading.Barrier(4)


class _Handler(BaseHTTPRequestHandler):
    server: Blend

    def do_GET(self) -> None:
        if self.server.api_key and self.headers["Authorization"] != f"Bearer {self.server.api_key}":
            self._answer(401, {"error": {"message": "no valid key"}})
        else:
            self._answer(200 if self.path == "/kvarena" else 404, self.server.described)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["prompt"]
        with self.server.lock:
            self.server.requests.append(request)
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            is_known = prompt in self.server.known
            self.server.known.add(prompt)
        if "wait" in prompt:
            self.server.all_arrived.wait(10)
        with self.server.lock:
            self.server.running -= 1
        if "long" in prompt:
            self._answer(400, {"error": {"message": "too many tokens", "code": 400}})
        elif "stock" in prompt:
            self._answer(200, {"kv_transfer_params": None})
        else:
            counts = {"store_hits": int(is_known), "store_misses": int(not is_known), "store_errors": 0}
            if "tiny" in prompt:
                counts = dict.fromkeys(counts, 0)
            if "broken" in prompt:
                counts |= {"store_errors": 2}
            self._answer(200, {"kv_transfer_params": {"kvarena": counts}})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def blend() -> Iterator[Blend]:
    with Blend() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url(server: Blend) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_the_request(blend: Blend) -> None:
    warm(url(blend), "town", [TextChunk("a", "text")])
    (request,) = blend.requests
    assert request["prompt"] == "<note>text<note>"
    assert request["model"] == "town"
    assert request["max_tokens"] == 1
    assert request["kv_transfer_params"] == {"kvarena": {"store": True}}


def test_inside_a_running_event_loop(blend: Blend) -> None:
    """As in a notebook."""

    async def cell() -> int:
        return warm(url(blend), "town", [TextChunk("a", "text")]).count("warmed")

    assert asyncio.run(cell()) == 1


def test_a_model_that_is_served_without_blending(blend: Blend) -> None:
    blend.described |= {"blends": False, "reason": "m can't be blended: its window is short"}
    with pytest.raises(StackError, match="stays empty: m can't be blended: its window is short"):
        warm(url(blend), "town", [TextChunk("a", "text")])
    assert not blend.requests


def test_a_key_is_shown_and_a_refused_one_named(blend: Blend) -> None:
    blend.api_key = "sesame"
    assert warm(url(blend), "town", [TextChunk("a", "text")], api_key="sesame").count("warmed") == 1
    with pytest.raises(StackError, match="refuses KVARENA_API_KEY: no valid key"):
        warm(url(blend), "town", [TextChunk("a", "text")])


def test_counts(blend: Blend) -> None:
    chunks = [TextChunk(name, f"{name} text") for name in ("one", "two", "tiny", "long", "stock", "broken")]
    seen: list[ChunkOutcome] = []
    result = warm(url(blend), "town", chunks, seen.append)
    assert [chunk.name for chunk in result.outcomes] == [chunk.name for chunk in chunks]
    assert sorted(chunk.name for chunk in seen) == sorted(chunk.name for chunk in chunks)
    assert [chunk.outcome for chunk in result.outcomes] == [
        "warmed",
        "warmed",
        "too_short",
        "failed",
        "failed",
        "failed",
    ]
    assert [failed.reason for failed in result.failures] == [
        "too many tokens",
        "the answer carries no request report",
        "2 store errors",
    ]
    again = warm(url(blend), "town", chunks[:2])
    assert again.to_json() == {
        "num_chunks": 2,
        "num_warmed": 0,
        "num_already_there": 2,
        "num_too_short": 0,
        "num_failed": 0,
        "too_short": [],
        "failures": [],
        "unusable": [],
    }


def test_chunks_that_are_not_kept_are_named(blend: Blend, console: Console) -> None:
    chunks = [TextChunk("one", "one"), TextChunk("sub/[a]", "tiny"), TextChunk("b", "long")]
    chunks += [TextChunk(f"t{number}", f"tiny {number}") for number in range(11)]
    result = warm(url(blend), "town", chunks)
    assert result.to_json()["too_short"] == ["sub/[a]", *(f"t{number}" for number in range(11))]
    show_warm_result(result, "data", console)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "Chunk cache: 1 computed, 0 already there, 12 too short to be kept, 1 refused.",
        "  sub/[a]: too short to be kept",
        *(f"  t{number}: too short to be kept" for number in range(9)),
        "  and 2 more",
        "  b: too many tokens",
    ]


def test_four_at_a_time(blend: Blend) -> None:
    warm(url(blend), "town", [TextChunk(f"c{i}", f"wait {i}") for i in range(8)])
    assert blend.most_running == 4


def test_chunks_of_one_name_are_told_apart(blend: Blend) -> None:
    result = warm(url(blend), "town", [TextChunk("a", "one"), TextChunk("a", "long")])
    assert [chunk.outcome for chunk in result.outcomes] == ["warmed", "failed"]


def test_no_chunks(blend: Blend) -> None:
    assert warm(url(blend), "town", []).outcomes == ()


def test_no_server() -> None:
    with pytest.raises(Unreachable):
        warm("http://127.0.0.1:9", "town", [TextChunk("a", "text")])


def test_a_server_without_our_chunk_cache(blend: Blend) -> None:
    with pytest.raises(StackError, match="LMCache's own blender has no chunk cache to fill"):
        warm(url(blend) + "/elsewhere", "town", [TextChunk("a", "text")])
    assert not blend.requests
