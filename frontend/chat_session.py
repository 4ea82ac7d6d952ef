"""All HTTP of the page: one `ChatSession` per contender, `SlotSession` for the one with KV slots. No Streamlit.

A session owns one worker thread that runs one event loop and one HTTP client for as long as the page's process
lives, so no connection and no client is built inside a measurement. Time stamps are taken in that thread, where the
bytes arrive. An answer is a stream of events (`figures.py`) that the worker hands to a callback; cancelling its
future closes the connection, upon which the server stops generating.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from contender_api import (
    ContenderError,
    Message,
    Sampling,
    Server,
    completion_request,
    explained,
    http_error,
    stream_error,
)
from figures import Done, Event, Failed, Figures, FirstToken, Stopwatch, Text, from_usage, with_report, without_report
from kvarena.client import bearer
from kvarena.documents import TextChunk
from kvarena.warm_request import WARM_PATH, ChunkOutcome, warm_outcome, warm_request
from settings import Contender
from slots import SlotTable

T = TypeVar("T")

STATE_TIMEOUT_S = 2.0
TOKENIZE_TIMEOUT_S = 20.0
FILLS_AT_ONCE = 2  # questions are answered meanwhile
REPORT_DELAYS_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
KEEPALIVE_S = 4.0  # shorter than uvicorn's 5 s, so that the client never reuses a connection that is being closed


class ChatSession:
    """The page's line to one contender. Every method may be called from any thread.

    `server` is what the last `refresh` that got through saw, and stays when the server goes down;
    `problem` is why the latest one didn't get through, empty while the server is up.
    """

    def __init__(self, contender: Contender, api_key: str = "", timeout_s: float = 600.0) -> None:
        self.contender = contender
        self.server: Server | None = None
        self.problem = "not asked yet"
        self.refreshed_s = float("-inf")
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._http = httpx.AsyncClient(
            base_url=contender.url,
            headers=bearer(api_key),
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S),
            trust_env=False,
        )
        threading.Thread(target=self._loop.run_forever, name=f"chat-{contender.name}", daemon=True).start()

    @property
    def up(self) -> bool:
        return not self.problem

    def refresh(self) -> Future[None]:
        """Asks the server what it is; the outcome is in `server` and `problem`, never raised."""
        return self._submit(self._refresh())

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids as this server's chat template and tokenizer make them.

        Raises `ContenderError`, as `text_ids` does.
        """
        return self._submit(self._tokenize({"messages": list(messages)})).result()

    def text_ids(self, text: str) -> list[int]:
        """The ids of a bare text, without the special tokens of a prompt."""
        payload = {"prompt": text, "add_special_tokens": False}
        return self._submit(self._tokenize(payload)).result()

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> Future[None]:
        """Starts an answer. `put` gets, in the worker's thread: Text and one FirstToken, then Done or Failed.
        `request_id` goes along as `X-Request-Id`, and stands in the server's log.

        Cancelling the future ends the stream; nothing is put after that but what was under way.
        """
        return self._submit(self._answer(list(messages), sampling, put, request_id))

    def fill(self, chunks: Sequence[TextChunk], put: Callable[[ChunkOutcome], None]) -> Future[None]:
        """Fills this server's chunk cache, a few chunks at a time; `put` gets the outcome of each in the worker's
        thread. Cancelling the future leaves out those that haven't ended.
        """
        return self._submit(self._fill(chunks, put))

    def close(self) -> None:
        """Ends the worker; the session is of no use afterwards."""
        self._submit(self._http.aclose()).result(timeout=STATE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # -- in the worker's thread ------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        try:
            with explained(self.contender, STATE_TIMEOUT_S):
                self.server = await self._describe()
            self.problem = ""
        except ContenderError as error:
            self.problem = str(error)
        self.refreshed_s = time.monotonic()

    async def _describe(self) -> Server:
        health = await self._http.get("/health", timeout=STATE_TIMEOUT_S)
        if health.is_server_error:  # a server may outlive its engine; one without such a path has none to ask for
            raise http_error(self.contender, health)
        models = await self._http.get("/v1/models", timeout=STATE_TIMEOUT_S)
        if models.is_error:
            raise http_error(self.contender, models)
        offer = await self._http.get("/kvarena", timeout=STATE_TIMEOUT_S)
        if offer.is_error and offer.status_code != httpx.codes.NOT_FOUND:
            raise http_error(self.contender, offer)
        return Server.read(models.json()["data"][0], None if offer.is_error else offer.json())

    async def _tokenize(self, payload: dict[str, Any]) -> list[int]:
        with explained(self.contender, TOKENIZE_TIMEOUT_S):
            server = await self._known_server()
            payload = {"model": server.model, **payload}
            reply = await self._http.post("/tokenize", json=payload, timeout=TOKENIZE_TIMEOUT_S)
            if reply.is_error:
                raise http_error(self.contender, reply)
            return [int(token) for token in reply.json()["tokens"]]

    async def _answer(
        self, messages: list[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> None:
        try:
            with explained(self.contender, self._timeout_s):
                server = await self._known_server()
                put(await self._stream(server, completion_request(server, messages, sampling), put, request_id))
        except ContenderError as error:
            put(Failed(str(error)))

    async def _fill(self, chunks: Sequence[TextChunk], put: Callable[[ChunkOutcome], None]) -> None:
        gate = asyncio.Semaphore(FILLS_AT_ONCE)

        async def fill_one(chunk: TextChunk) -> None:
            async with gate:
                put(await self._fill_chunk(chunk))

        await asyncio.gather(*map(fill_one, chunks))

    async def _fill_chunk(self, chunk: TextChunk) -> ChunkOutcome:
        try:
            with explained(self.contender, self._timeout_s):
                server = await self._known_server()
                if server.blend is None:
                    raise ContenderError(f"{self.contender.title} has no chunk cache to fill.")
                body = warm_request(server.model, chunk.text, server.blend.separator)
                reply = await self._http.post(WARM_PATH, json=body)
                if reply.is_error:
                    raise http_error(self.contender, reply)
                return warm_outcome(chunk.name, reply.json())
        except ContenderError as error:
            return ChunkOutcome(chunk.name, "failed", str(error))

    async def _known_server(self) -> Server:
        if self.server is None:
            self.server = await self._describe()
        return self.server

    async def _stream(
        self,
        server: Server,
        body: dict[str, Any],
        put: Callable[[Event], None],
        request_id: str,
    ) -> Done:
        answer_id, usage, finish_reason, num_texts = "", None, None, 0
        first_s = last_s = None
        headers = {"X-Request-Id": request_id}
        sent_s = time.perf_counter()
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.is_error:
                await response.aread()
                raise http_error(self.contender, response)
            async for chunk in self._chunks(response):
                now_s = time.perf_counter()
                answer_id = chunk.get("id") or answer_id
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    delta = choice.get("delta") or {}
                    text = delta.get("content") or delta.get("reasoning_content") or ""
                    finish_reason = choice.get("finish_reason") or finish_reason
                    if text or finish_reason:
                        last_s = now_s
                        if first_s is None:
                            first_s = now_s
                            put(FirstToken((first_s - sent_s) * 1000))
                    if text:
                        num_texts += 1
                        put(Text(text))
        if finish_reason is None:
            raise stream_error(self.contender, num_texts)
        figures = from_usage(Stopwatch(sent_s, first_s, last_s), usage, self.contender.approximate)
        return Done(await self._reported(server, answer_id, figures), finish_reason)

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        """The stream's JSON objects. An error object in the stream, or no JSON, raises `ContenderError`."""
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            try:
                chunk = json.loads(data)
            except json.JSONDecodeError as error:
                raise ContenderError(f"{self.contender.title} sent something that is no JSON: {data[:200]}") from error
            if chunk.get("error"):
                raise http_error(self.contender, response, chunk)
            yield chunk

    async def _reported(self, server: Server, answer_id: str, figures: Figures) -> Figures:
        """The figures with the request report, which may come a moment after the stream's end."""
        if not server.keeps_reports:
            return figures
        for delay_s in REPORT_DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                reply = await self._http.get(f"/kvarena/requests/{answer_id}", timeout=STATE_TIMEOUT_S)
                if reply.is_success:
                    return with_report(figures, reply.json())
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                break
        return without_report(figures)


class SlotSession(ChatSession):
    """A `ChatSession` that says in every request whether the slots are used, and whose conversation it is."""

    def __init__(self, contender: Contender, use_cache: bool, api_key: str = "", timeout_s: float = 600.0) -> None:
        super().__init__(contender, api_key, timeout_s)
        self._use_cache = use_cache

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> Future[None]:
        """The two modes' conversations have names of their own, so that neither goes on with the other's turns; and so
        have their requests, which one server gets.
        """
        user = f"{sampling.user}-{self.contender.name}" if sampling.user else ""
        chosen = dataclasses.replace(sampling, use_cache=self._use_cache, user=user)
        return super().answer(messages, chosen, put, f"{request_id}-{self.contender.name}")

    def slots(self) -> Future[SlotTable]:
        """What lies in the slots now. Its result raises `ContenderError`."""
        return self._submit(self._slots())

    async def _slots(self) -> SlotTable:
        with explained(self.contender, STATE_TIMEOUT_S):
            reply = await self._http.get("/slots", timeout=STATE_TIMEOUT_S)
            if reply.is_error:
                raise http_error(self.contender, reply)
            return SlotTable.read(reply.json())
