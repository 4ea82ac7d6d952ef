"""The chunk cache is filled: the data folder is read, and what can't be used is shown with the reason. The store is
asked for each chunk; what is missing is sent between two separators, and asked for again.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvarena import client
from kvarena.client import ChunkOutcome, Unreachable
from kvarena.documents import Documents, TextChunk
from kvarena.home import StackError
from kvarena.stack.chunk_cache import WarmResult, read_documents, show_warm_result, warm, warm_with_progress
from kvarena.stack.record import Record

# --- Reading the data folder ---


def shown(folder: Path) -> tuple[list[str], list[str]]:
    """The chunks' names, and the lines that were printed."""
    console = Console(file=io.StringIO(), width=200)
    documents = read_documents(Record((), "", str(folder), "town", chunk_tokens=64), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [chunk.name for chunk in documents.chunks], lines


def test_good_files_need_no_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text.")
    assert shown(tmp_path) == (["a"], [])


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A sentence. " * 40)
    (tmp_path / "[b].txt").write_bytes("Über den Fluss".encode("latin-1"))
    (tmp_path / "c.md").touch()
    names, lines = shown(tmp_path)
    assert names == ["a 01", "a 02"]
    assert lines == [
        "Chunks are of an estimated size, 4 bytes to a token: there is no tokenizer.json of this model here.",
        "2 files can't be used:",
        "  [b].txt: not UTF-8 (byte 0), and no other encoding is certain; save it as UTF-8",
        "  c.md: empty",
    ]


def test_they_are_in_the_json_too(tmp_path: Path) -> None:
    (tmp_path / "c.md").touch()
    documents = read_documents(Record((), "", str(tmp_path), "town"), Console(file=io.StringIO()))
    assert WarmResult((), documents.problems).to_json()["unusable"] == [{"file": "c.md", "reason": "empty"}]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no folder of chunk files"):
        shown(tmp_path / "nowhere")


# --- Filling ---


class Blend(ThreadingHTTPServer):
    """Answers as the blend does, over a store that keeps the last `num_kept` of the chunks that are sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.described: dict[str, Any] = {"separator": "<note>"}
        self.requests: list[dict[str, Any]] = []
        self.chats: list[dict[str, Any]] = []
        self.has_chat = True
        self.held: list[str] = []
        self.num_kept = 100
        self.down_until_s = 0.0
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
        if self.path == "/v1/chat/completions":
            self.server.chats.append(request)
            self._answer(200 if self.server.has_chat else 400, {})
            return
        prompt = request["prompt"]
        if self.path == "/kvarena/chunks":
            self._answer(200, {"chunks": self._look_up(prompt)})
            return
        with self.server.lock:
            self.server.requests.append(request)
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            if "full" not in prompt and "broken" not in prompt:
                self.server.held = [*self.server.held, prompt][-self.server.num_kept :]
        if "wait" in prompt:
            self.server.all_arrived.wait(10)
        with self.server.lock:
            self.server.running -= 1
        if "long" in prompt:
            self._answer(400, {"error": {"message": "too many tokens", "code": 400}})
        else:
            self._answer(200, {})

    def _look_up(self, prompt: str) -> list[dict[str, object]]:
        """The token before the first separator is a chunk too, and too short."""
        first = {"start": 0, "end": 1, "held": False, "reason": "too_short"}
        if "unmarked" in prompt:
            return []
        is_down = "broken" in prompt or time.monotonic() < self.server.down_until_s
        reason = "too_short" if "tiny" in prompt else "store_down" if is_down else "not_stored"
        is_held = prompt in self.server.held
        return [first, {"start": 1, "end": 9, "held": is_held, **({} if is_held else {"reason": reason})}]

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
    assert request["kv_transfer_params"] == {"kvarena": {"policy": "none", "store": "all"}}


def test_the_beginning_of_chats(blend: Blend) -> None:
    warm(url(blend), "town", [TextChunk("a", "text")], system="Be brief.")
    (chat,) = blend.chats
    assert chat["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<note>"}]
    assert chat["kv_transfer_params"] == {"kvarena": {"policy": "none", "store": "all"}}
    blend.has_chat = False
    assert warm(url(blend), "town", [TextChunk("b", "text b")], system="").count("warmed") == 1


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


def test_counts(blend: Blend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STORE_WAIT_S", 0.2)
    names = ("one", "two", "tiny", "long", "full", "broken", "unmarked")
    chunks = [TextChunk(name, f"{name} text") for name in names]
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
        "failed",
    ]
    assert [failed.reason for failed in result.failures] == [
        "too many tokens",
        "the store didn't keep it; it may be full",
        "the store doesn't answer",
        "the separator was not found around it",
    ]
    blend.requests.clear()
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
    assert not blend.requests, "what is there isn't sent"


def test_a_store_that_comes_back_is_waited_for(blend: Blend) -> None:
    blend.down_until_s = time.monotonic() + 1
    assert warm(url(blend), "town", [TextChunk("a", "text")]).count("warmed") == 1


def test_a_store_that_is_too_small_for_all_is_told_by_chunk(blend: Blend) -> None:
    blend.num_kept = 5  # more than are sent at once
    chunks = [TextChunk(name, f"{name} text") for name in "abcdefgh"]
    seen: list[ChunkOutcome] = []
    result = warm(url(blend), "town", chunks, seen.append)
    assert (result.count("warmed"), result.count("failed")) == (5, 3)
    kept = {chunk.name for chunk in result.outcomes if chunk.outcome == "warmed"}
    assert kept == {chunk.name for chunk in chunks if f"<note>{chunk.text}<note>" in blend.held}
    assert {failed.reason for failed in result.failures} == {
        "the store kept it, but not until the end; it may be too small for all chunks"
    }
    assert set(result.failures) <= set(seen)


def test_chunks_that_are_not_kept_are_named(blend: Blend, console: Console) -> None:
    chunks = [TextChunk("one", "one"), TextChunk("sub/[a]", "tiny"), TextChunk("b", "long")]
    chunks += [TextChunk(f"t{number}", f"tiny {number}") for number in range(11)]
    result = warm(url(blend), "town", chunks)
    assert result.to_json()["too_short"] == ["sub/[a]", *(f"t{number}" for number in range(11))]
    show_warm_result(result, "data", console)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "Chunk cache: 1 computed, 0 already there, 12 too short to be kept, 1 failed.",
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


def test_without_a_chunk_cache_there_is_nothing_to_fill() -> None:
    nothing = Record((), "", "data", "town")
    with pytest.raises(StackError, match="no running contender has a chunk cache; start one that has: blend"):
        warm_with_progress(nothing, Documents(), Console(quiet=True), "")
