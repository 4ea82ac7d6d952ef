"""All HTTP of the page: one `ChatSession` for each contender, `SlotSession` for the one with KV slots, `StoreSession`
for an LMCache server. No Streamlit.

A session owns one client (`kvarena.client`), which runs in a worker thread for as long as the page's process lives. An
answer is a stream of events (`figures.py`) that the worker passes to a callback; cancelling its future closes the
connection, and the server stops generating.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from contender_api import ContenderError, Message, Sampling, Server, completion_request, explained
from figures import Done, Event, Failed, Figures, FirstToken, Sent, Text, of_answer, with_report, without_report
from kvarena.client import CHAT, TIMEOUT_S, ChunkOutcome, Client, ClientError, Refused, StreamedAnswer, Token
from kvarena.documents import TextChunk
from servers_view import Watched, lmcache_watched, read_metrics
from settings import Contender, Service
from slots import NextTopic, SlotTable
from tokens import token_texts

STATE_TIMEOUT_S = 2.0
TOKENIZE_TIMEOUT_S = 20.0
FILLS_AT_ONCE = 2  # so that questions are answered meanwhile


class ChatSession:
    """The page's connection to one contender. Every method may be called from any thread.

    `server` is what the last successful `refresh` saw, and stays when the server goes down; `problem` says why the
    latest one failed, and is empty while the server is up.
    """

    def __init__(self, contender: Contender, api_key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self.contender = contender
        self.server: Server | None = None
        self.problem = "not asked yet"
        self.refreshed_s = float("-inf")
        self._client = Client(contender.url, api_key, timeout_s)

    @property
    def up(self) -> bool:
        return not self.problem

    def refresh(self) -> Future[None]:
        """Asks the server what it is; the outcome is in `server` and `problem`, never raised."""
        return self._client.start(self._refresh())

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids by this server's chat template and tokenizer. Raises `ContenderError`, as `text_ids`
        does.
        """
        return self._client.start(self._token_ids({"messages": list(messages)})).result()

    def prompt_tokens(self, messages: Sequence[Message]) -> list[str]:
        """The texts of the prompt's tokens. Raises `ContenderError`."""
        return self._client.start(self._token_texts({"messages": list(messages)})).result()

    def text_ids(self, text: str) -> list[int]:
        """The ids of a bare text, without the special tokens of a prompt."""
        payload = {"prompt": text, "add_special_tokens": False}
        return self._client.start(self._token_ids(payload)).result()

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> Future[None]:
        """Starts an answer. The worker's thread calls `put` with Sent, then Text and one FirstToken, then Done or
        Failed. `request_id` goes along as `X-Request-Id`, and is in the server's log.

        Cancelling the future ends the stream; after that at most one event more is put.
        """
        return self._client.start(self._answer(list(messages), sampling, put, request_id))

    def fill(self, chunks: Sequence[TextChunk], put: Callable[[ChunkOutcome], None]) -> Future[None]:
        """Fills this server's chunk cache, a few chunks at a time; the worker's thread calls `put` with the outcome of
        each. Cancelling the future leaves out the chunks that aren't done.
        """
        return self._client.start(self._fill(chunks, put))

    def watch(self, request_id: str) -> Future[Watched]:
        """What the server is doing now, and its log's lines on a request. The result raises `ContenderError`."""
        return self._client.start(self._watch(request_id))

    def close(self) -> None:
        """Ends the worker; the session is of no use afterwards."""
        self._client.close()

    # -- in the worker's thread ------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        try:
            with explained(self.contender):
                self.server = await self._describe()
            self.problem = ""
        except ContenderError as error:
            self.problem = str(error)
        self.refreshed_s = time.monotonic()

    async def _describe(self) -> Server:
        return Server.read(await self._client.aio.describe(STATE_TIMEOUT_S), self.contender.report)

    async def _token_ids(self, prompt: dict[str, Any]) -> list[int]:
        with explained(self.contender):
            server = await self._known_server()
            return await self._client.aio.token_ids({"model": server.model, **prompt}, TOKENIZE_TIMEOUT_S)

    async def _token_texts(self, prompt: dict[str, Any]) -> list[str]:
        with explained(self.contender):
            server = await self._known_server()
            body = {"model": server.model, "return_token_strs": True, **prompt}
            return token_texts((await self._client.aio.post("/tokenize", body, TOKENIZE_TIMEOUT_S))["token_strs"])

    async def _answer(
        self, messages: list[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> None:
        def put_token(answer: StreamedAnswer, token: Token) -> None:
            if len(answer.tokens) == 1:
                put(FirstToken(answer.ttft_ms))
            if token.text:
                put(Text(token.text))

        try:
            with explained(self.contender):
                server = await self._known_server()
                body = completion_request(server, messages, sampling)
                put(Sent({key: value for key, value in body.items() if key != "messages"}))
                answer = await self._client.aio.stream(CHAT, body, put_token, request_id)
                put(Done(await self._figures(server, answer), answer.finish_reason or ""))
        except ContenderError as error:
            put(Failed(str(error)))

    async def _fill(self, chunks: Sequence[TextChunk], put: Callable[[ChunkOutcome], None]) -> None:
        try:
            with explained(self.contender):
                server = await self._known_server()
                if server.blend is None:
                    raise ContenderError(f"{self.contender.title} has no chunk cache to fill.")
        except ContenderError as error:
            for chunk in chunks:
                put(ChunkOutcome(chunk.name, "failed", str(error)))
            return
        separator = server.blend.separator
        await self._client.aio.warm(server.model, chunks, separator, FILLS_AT_ONCE, put)
        if server.blend.has_seams:
            with suppress(ClientError):  # the chunks are there, and are reused without seams
                await self._client.aio.make_seams(server.model, chunks, separator, lambda _done, _total: None)

    async def _watch(self, request_id: str) -> Watched:
        with explained(self.contender):
            metrics = await self._client.aio.text("/metrics", STATE_TIMEOUT_S)
            try:
                log = await self._client.aio.get(f"/kvarena/log/{request_id}", STATE_TIMEOUT_S)
            except Refused:  # a server that isn't of the stack has no such path
                log = {"lines": ()}
            return Watched(tuple(log["lines"]), read_metrics(metrics))

    async def _known_server(self) -> Server:
        if self.server is None:
            self.server = await self._describe()
        return self.server

    async def _figures(self, server: Server, answer: StreamedAnswer) -> Figures:
        """With the request report, if the contender keeps one."""
        figures = of_answer(answer, self.contender.approximate)
        if not server.keeps_reports:
            return figures
        try:
            report = await self._client.aio.report(answer.request_id, STATE_TIMEOUT_S)
            if report:
                return with_report(figures, report, self.contender.report, answer.timings)
            return without_report(figures)
        except (ClientError, KeyError, TypeError):
            return without_report(figures)


class SlotSession(ChatSession):
    """A `ChatSession` whose every request says whether slots are used, and to which conversation it belongs."""

    def __init__(self, contender: Contender, use_cache: bool, api_key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(contender, api_key, timeout_s)
        self._use_cache = use_cache

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, put: Callable[[Event], None], request_id: str
    ) -> Future[None]:
        """Both modes ask one server. Their conversations and requests have names of their own, so that neither goes on
        with the other's turns.
        """
        named = self._named(sampling.conversation)
        chosen = dataclasses.replace(sampling, use_cache=self._use_cache, conversation=named)
        return super().answer(messages, chosen, put, f"{request_id}-{self.contender.name}")

    def slots(self) -> Future[SlotTable]:
        """What the slots hold now. The result raises `ContenderError`."""
        return self._client.start(self._slots())

    def topic(self, messages: Sequence[Message], conversation: str) -> Future[NextTopic]:
        """Which topic the last message would go to, without sending it. The result raises `ContenderError`."""
        return self._client.start(self._topic(list(messages), self._named(conversation)))

    def _named(self, conversation: str) -> str:
        return f"{conversation}-{self.contender.name}" if conversation else ""

    async def _topic(self, messages: list[Message], conversation: str) -> NextTopic:
        with explained(self.contender):
            server = await self._known_server()
            body = {"model": server.model, "messages": messages, "session_id": conversation}
            told = await self._client.aio.post("/topic", body, STATE_TIMEOUT_S)
            return NextTopic(str(told["topic"]), bool(told["is_new"]))

    async def _slots(self) -> SlotTable:
        with explained(self.contender):
            return SlotTable.read(await self._client.aio.get("/slots", STATE_TIMEOUT_S))


class StoreSession:
    """The page's connection to the HTTP of an LMCache server, which asks for no key."""

    def __init__(self, server: Service) -> None:
        self.server = server
        self._client = Client(server.url, timeout_s=STATE_TIMEOUT_S)

    def watch(self) -> Future[Watched]:
        """Its state, and how full it is. The result raises `ContenderError`."""
        return self._client.start(self._watch())

    def close(self) -> None:
        self._client.close()

    async def _watch(self) -> Watched:
        with explained(self.server):
            memory = await self._client.aio.lmcache_memory(STATE_TIMEOUT_S)
            return lmcache_watched(memory, read_metrics(await self._client.aio.text("/metrics", STATE_TIMEOUT_S)))
