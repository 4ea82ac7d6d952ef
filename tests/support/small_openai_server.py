"""A small real HTTP server that speaks the part of the contenders' API that the page uses.

What it does with the next completion is set on its attributes: stream at some pace, wait for the test, refuse, break
off in the middle. Its tokenizer gives each distinct word a number.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kvarena.policies.params import POLICIES, describe_parameters

REQUEST_ID = "chatcmpl-1"
OFFER: dict[str, Any] = {
    "contender": "blend",
    "policies": list(POLICIES),
    "parameters": describe_parameters(),
    "defaults": {"policy": "kv_deviation", "ratio": 0.15, "check_layer": 2},
    "separator": " <sep> ",
}
SIMLLM_OFFER = {
    "contender": "simllm",
    "modes": ["aligned", "top_layer"],
    "defaults": {"reuse": True, "mode": "aligned", "similarity_threshold": 0.998},
}
SIMLLM_REPORT = {
    "contender": "simllm",
    "approximate": True,
    "mode": "aligned",
    "similarity_threshold": 0.998,
    "hit": True,
    "similarity": 0.99934,
    "num_prompt_tokens": 100,
    "num_reused_tokens": 70,
    "num_recomputed_tokens": 20,
    "num_computed_tokens": 10,
    "num_layer_passes": 222,
    "num_layer_passes_without_reuse": 600,
    "matched_prompt": "<note>Bruno plays the <b>lute</b>.",
    "num_matched_prompt_tokens": 1234,
    "spans": [{"start": 0, "end": 90, "source": "reused"}, {"start": 90, "end": 100, "source": "computed"}],
}
REPORT_VIEWS = {"blend": "blend", "simllm": "similar_task", "ai100": "slots"}
AI100_OFFER = {"contender": "ai100", "defaults": {"use_cache": True}, "ctx_len": 200, "kv_cache_batch_size": 2}
AI100_REPORT = {
    "contender": "ai100",
    "approximate": False,
    "topic": "<i>cooking</i>",
    "notes": "bread, <i>salt</i>",
    "slot": 1,
    "turn": 2,
    "status": "INCREMENTAL_PREFILL",
    "reason": None,
    "num_prompt_tokens": 100,
    "num_reused_tokens": 91,
    "num_recomputed_tokens": 0,
    "num_computed_tokens": 9,
    "num_prefilled_tokens": 9,
    "num_decoded_tokens": 3,
    "timings": {"queue_ms": 0.5, "prefill_ms": 12.5, "decode_ms": 30.25, "total_ms": 43.25},
    "spans": [{"start": 0, "end": 91, "source": "reused"}, {"start": 91, "end": 100, "source": "computed"}],
}
REPORT = {
    "approximate": True,
    "policy": "kv_deviation",
    "ratio": 0.15,
    "num_prompt_tokens": 100,
    "num_reused_tokens": 70,
    "num_recomputed_tokens": 20,
    "num_computed_tokens": 10,
    "num_prefix_tokens": 5,
    "spans": [{"start": 0, "end": 90, "source": "reused"}, {"start": 90, "end": 100, "source": "computed"}],
}


@dataclass
class SmallServer:
    """`offer` None makes it a plain contender; `slots`, `metrics`: what `GET /slots` and `/metrics` answer, `timings`
    vLLM's of a request; `topics`: the first of these words in a message is what `POST /topic` answers, else it is a new
    one. `cut_after` pieces of text, the connection is closed. `hold_after` pieces, an answer waits for `go_on`, or
    until its client has gone; with `hold_topics`, so does a topic.
    """

    pieces: list[str] = field(default_factory=lambda: ["Hello", ", ", "world"])
    offer: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=lambda: dict(REPORT))
    slots: dict[str, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    metrics: str = "vllm:num_requests_running 0.0\nprocess_resident_memory_bytes 1.048576e+06\n"
    topics: tuple[str, ...] = ()
    hold_topics: bool = False
    own_system_prompt: str = ""
    num_missing_reports: int = 0
    cached_tokens: int = 0
    delay_s: float = 0.0
    silence_s: float = 0.0
    cut_after: int | None = None
    hold_after: int | None = None
    go_on: threading.Event = field(default_factory=threading.Event)
    error: tuple[int, str] | None = None
    stream_error: str = ""
    health: tuple[int, dict[str, Any]] = (200, {})
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    num_open_streams: int = 0
    num_held: int = 0
    num_broken_streams: int = 0

    def __post_init__(self) -> None:
        self.words: dict[str, int] = {}
        self._connections: list[socket.socket] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Takes no more connections and closes those there are."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def num_connections(self) -> int:
        """So many were opened."""
        return len(self._connections)

    def completions(self) -> list[dict[str, Any]]:
        return [body for path, body, _ in self.requests if path == "/v1/chat/completions"]

    def prompts(self) -> list[list[int]]:
        """The token ids of every completion that was asked for as a stream."""
        return [body["prompt"] for path, body, _ in self.requests if path == "/v1/completions" and body.get("stream")]

    def tokens(self, text: str) -> list[int]:
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                server._connections.append(self.connection)

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._record({})
                if self.path == "/health":
                    self._reply(*server.health)
                elif self.path == "/v1/models":
                    self._reply(200, {"data": [{"id": "small", "max_model_len": 4096}]})
                elif self.path == "/kvarena" and server.offer:
                    self._reply(200, server.offer)
                elif self.path == "/metrics":
                    self._reply_text(server.metrics)
                elif self.path.startswith("/kvarena/log/"):
                    line = {"request_id": self.path.rsplit("/")[-1], "total_ms": 12.5, "details": {"fetch_ms": 1.5}}
                    self._reply(200, {"lines": [json.dumps(line)]})
                elif self.path == "/slots" and server.slots:
                    self._reply(200, server.slots)
                elif self.path == f"/kvarena/requests/{REQUEST_ID}" and server.offer:
                    self._reply_report()
                else:
                    self._reply(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._record(body)
                if self.path == "/tokenize":
                    text = body.get("prompt") or prompt_text(body["messages"], server.own_system_prompt)
                    names = ["Ġ" + word for word in text.split()]
                    self._reply(200, {"tokens": server.tokens(text), "token_strs": names})
                elif server.error:
                    status, message = server.error
                    self._reply(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})
                elif self.path == "/topic":
                    if server.hold_topics:
                        server.go_on.wait(60)
                    said = body["messages"][-1]["content"]
                    known = next((topic for topic in server.topics if topic in said), None)
                    self._reply(200, {"topic": known or said[:20], "is_new": known is None})
                elif self.path == "/kvarena/chunks":
                    is_held = body["prompt"] in server.held
                    self._reply(200, {"chunks": [{"held": is_held, **({} if is_held else {"reason": "not_stored"})}]})
                elif self.path == "/v1/completions" and not body.get("stream"):
                    server.held.add(body["prompt"])
                    self._reply(200, {})
                else:
                    self._stream(with_logprobs=body.get("logprobs", False))

            def _record(self, body: dict[str, Any]) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.requests.append((self.path, body, headers))

            def _reply_report(self) -> None:
                if server.num_missing_reports > 0:
                    server.num_missing_reports -= 1
                    self._reply(404, {"error": {"message": "unknown request"}})
                else:
                    self._reply(200, server.report)

            def _reply(self, status: int, body: dict[str, Any]) -> None:
                self._send(status, "application/json", json.dumps(body).encode())

            def _reply_text(self, text: str) -> None:
                self._send(200, "text/plain", text.encode())

            def _send(self, status: int, kind: str, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, with_logprobs: bool) -> None:
                server.num_open_streams += 1
                try:
                    self._write_stream(with_logprobs)
                except OSError:
                    server.num_broken_streams += 1
                    self.close_connection = True
                finally:
                    server.num_open_streams -= 1

            def _write_stream(self, with_logprobs: bool) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
                time.sleep(server.silence_s)
                for index, piece in enumerate(server.pieces):
                    if index == server.cut_after:
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    likely = {"token": piece.strip(), "logprob": -0.25}
                    entry = {**likely, "top_logprobs": [likely, {"token": "<other>", "logprob": -2.0}]}
                    logprobs = {"logprobs": {"content": [entry]}} if with_logprobs else {}
                    self._event({"choices": [{"delta": {"content": piece}, **logprobs}]})
                    if index + 1 == server.hold_after:
                        self._hold()
                    time.sleep(server.delay_s)
                if server.stream_error:
                    self._event({"error": {"message": server.stream_error}})
                self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                timings = {"metrics": server.timings} if server.timings else {}
                self._event({"choices": [], "usage": self._usage(), **timings})
                self._chunk(b"data: [DONE]\n\n")
                self._chunk(b"")

            def _hold(self) -> None:
                """Raises `ConnectionError` once the client has gone."""
                server.num_held += 1
                while not server.go_on.wait(0.01):
                    with contextlib.suppress(BlockingIOError):
                        if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                            raise ConnectionError("the client has gone")

            def _usage(self) -> dict[str, Any]:
                details = {"cached_tokens": server.cached_tokens}
                return {
                    "prompt_tokens": 100,
                    "completion_tokens": len(server.pieces) + 1,
                    "prompt_tokens_details": details,
                }

            def _event(self, body: dict[str, Any]) -> None:
                self._chunk(b"data: " + json.dumps({"id": REQUEST_ID, **body}).encode() + b"\n\n")

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

        return Handler


def prompt_text(messages: list[dict[str, str]], own_system_prompt: str = "") -> str:
    """A chat template: every message after its role, then the assistant's turn."""
    if own_system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": own_system_prompt}, *messages]
    return " ".join(f"[{message['role']}] {message['content']}" for message in messages) + " [assistant]"


StartServer = Callable[..., SmallServer]


def report_of(server: SmallServer) -> str:
    """How the page is told to show the reports of a server with this offer."""
    return REPORT_VIEWS.get((server.offer or {}).get("contender", ""), "")


@contextlib.contextmanager
def started_servers() -> Iterator[Callable[..., SmallServer]]:
    """Starts servers when it is called; they are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(**behaviour: Any) -> SmallServer:
            server = SmallServer(**behaviour)
            stack.callback(server.stop)
            return server

        yield start
