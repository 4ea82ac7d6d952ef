"""An OpenAI address as a client of the benchmarks sees it: its model, what it offers, its streams, its reports."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from kvarena.client import API_KEY_VARIABLE, bearer
from kvarena.stack.chunk_cache import error_message

REPORT_DELAYS_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
CONNECT_TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """A request wasn't answered; the message says why."""


class OpenAIServer:
    """Raises `ValueError` when nothing that speaks OpenAI's API answers at `url`.

    `offer` is what `GET /kvarena` tells, None where there is no such path; `root` the served model's folder or hub
    name, `max_model_len` its longest context in tokens, each None where the server doesn't say. Threads may share it.
    """

    def __init__(self, name: str, url: str, api_key: str = "", timeout_s: float = 120.0) -> None:
        self.name, self.url = name, url.removesuffix("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            headers=bearer(api_key),
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )
        try:
            model = self._http.get("/v1/models").raise_for_status().json()["data"][0]
            offer = self._http.get("/kvarena")
            self.offer: dict[str, Any] | None = offer.json() if offer.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{name}: {_why_not(error, self.url, bool(api_key))}") from error
        self.model: str = model["id"]
        self.root: str | None = model.get("root")
        self.max_model_len: int | None = model.get("max_model_len")

    @property
    def is_blend(self) -> bool:
        return bool(self.offer and self.offer.get("contender") == "blend")

    @property
    def separator(self) -> str | None:
        """What it cuts chunks at, where it says so."""
        return (self.offer or {}).get("separator")

    def can_tokenize(self) -> bool:
        """Whether it has `/tokenize`, as vLLM, SGLang and our own engines have: these take `ignore_eos` too."""
        try:
            return self._http.post("/tokenize", json={"model": self.model, "prompt": "a"}).is_success
        except httpx.HTTPError:
            return False

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion, its usage among them. Raises `NoAnswer` for whatever goes wrong."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", path, json={"model": self.model, **body, **options}) as response:
                if response.is_error:
                    response.read()
                    raise NoAnswer(error_message(response))
                yield from _events(response)
        except httpx.HTTPError as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    def report(self, request_id: str) -> dict[str, Any] | None:
        """The request report, which may come a moment after the stream's end; None where the server keeps none.

        Raises `NoAnswer` when the server is gone.
        """
        for delay_s in REPORT_DELAYS_S if self.offer is not None else ():
            time.sleep(delay_s)
            try:
                reply = self._http.get(f"/kvarena/requests/{request_id}")
            except httpx.HTTPError as error:
                raise NoAnswer(f"{type(error).__name__}: {error}") from error
            if reply.is_success:
                report: dict[str, Any] = reply.json()
                return report
        return None

    def close(self) -> None:
        self._http.close()


def _why_not(error: Exception, url: str, has_key: bool) -> str:
    """What keeps a server from being asked."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{url} wants {API_KEY_VARIABLE}, which is {'another one than this' if has_key else 'not set here'}"
    return f"no OpenAI server answers at {url} ({error})"


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            event = json.loads(data)
        except json.JSONDecodeError as error:
            raise NoAnswer(f"the server sent something that is no JSON: {data[:200]}") from error
        if event.get("error"):
            raise NoAnswer(str(event["error"].get("message") or event["error"]))
        yield event
