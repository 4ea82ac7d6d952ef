"""The one HTTP client of the contenders: for the page, the benchmarks and the stack.

Answers are streamed through the `openai` package, the project's own paths go through `httpx`, both over the same
connections. `AsyncClient` does the work. `Client` runs one in a worker thread of its own, for callers without an event
loop and for several threads at once. Keep a client for as long as a server is asked: making one takes longer than many
a first token. Times are taken in the worker, where the bytes arrive. Whatever goes wrong is a `ClientError`, whose
message is for people.

The servers and the stack import only the API key's name from here, so `httpx` and `openai` are imported when a client
is made and when it first needs them.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from kvarena.documents import TextChunk, build_messages, contexts_for_scores, contexts_for_seams, join_chunks

if TYPE_CHECKING:
    import httpx
    import openai

T = TypeVar("T")
P = ParamSpec("P")

API_KEY_VARIABLE = "KVARENA_API_KEY"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
CHUNKS = "/kvarena/chunks"

TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 2.0  # well below uvicorn's 5 s, so that nothing is sent on a connection that is being closed
REPORT_DELAYS_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
MAX_DETAIL_CHARS = 600


def bearer(api_key: str) -> dict[str, str]:
    """The headers with an API key; none for an empty one, which is right where no key is set."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


# -- what can go wrong -------------------------------------------------------------------------------------------------


class ClientError(Exception):
    """A request without a usable answer."""

    @property
    def reason(self) -> str:
        """The message; of a refusal only what the server said."""
        return str(self)


class Unreachable(ClientError):
    """Nothing listens at the address."""


class Silent(ClientError):
    """The server took too long."""


class ConnectionLost(ClientError):
    """The connection broke off."""


class Refused(ClientError):
    """An HTTP error status, and the message of the server's error object."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status, self._said = status, said

    @property
    def reason(self) -> str:
        return self._said


class StreamFailed(ClientError):
    """An error object in the stream, or a stream that ended without a finish."""


class Unexpected(ClientError):
    """An answer that isn't of the OpenAI API, or of ours."""


# -- what a server tells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerInfo:
    """`root` is the served model's folder or hub name, `max_model_len` its longest context in tokens; None if the
    server doesn't say. `offer` is the answer of `GET /kvarena`, None if there is no such path, as in stock vLLM.
    """

    model: str
    root: str | None = None
    max_model_len: int | None = None
    offer: Mapping[str, Any] | None = None

    @property
    def contender(self) -> str:
        return str((self.offer or {}).get("contender") or "")

    @property
    def separator(self) -> str | None:
        """What separates chunks for it, if it says so."""
        return (self.offer or {}).get("separator")


@dataclass(frozen=True)
class Usage:
    """OpenAI's `usage`. `num_cached_tokens` is the part of the prompt that wasn't prefilled; None: unknown."""

    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None

    @classmethod
    def read(cls, usage: Mapping[str, Any] | None) -> Usage:
        usage = usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return cls(usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))


@dataclass(frozen=True)
class Token:
    """A piece of an answer; without text if it only ends the answer. `time_s` is when it arrived."""

    text: str
    time_s: float
    is_reasoning: bool = False


@dataclass
class StreamedAnswer:
    """An answer as far as it has come; a complete one has a token. Times are `time.perf_counter`'s, in seconds.

    A chat's opening, which has a role and no text, is no token; a finish without text is one. `logprobs` are OpenAI's
    entries for a chat's tokens, `timings` vLLM's milliseconds for this request, if it sends them.
    """

    sent_s: float
    ended_s: float = 0.0
    request_id: str = ""
    finish_reason: str | None = None
    usage: Usage = Usage()
    tokens: list[Token] = field(default_factory=list)
    logprobs: list[Mapping[str, Any]] = field(default_factory=list)
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Without the reasoning before it."""
        return "".join(token.text for token in self.tokens if not token.is_reasoning)

    @property
    def ttft_ms(self) -> float:
        """Only of an answer that has a token."""
        return 1000 * (self.tokens[0].time_s - self.sent_s)

    def add(self, event: Mapping[str, Any], now_s: float) -> Iterator[Token]:
        """Takes in an event of the stream that arrived at `now_s`; yields its tokens."""
        self.request_id = event.get("id") or self.request_id
        if event.get("usage"):
            self.usage = Usage.read(event["usage"])
        self.timings = event.get("metrics") or self.timings
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.logprobs += (choice.get("logprobs") or {}).get("content") or ()
            text = choice.get("text") or delta.get("content") or ""
            reasoning = delta.get("reasoning_content") or ""
            if "text" in choice or text or reasoning or choice.get("finish_reason"):
                token = Token(text or reasoning, now_s, is_reasoning=not text and bool(reasoning))
                self.tokens.append(token)
                yield token


OnToken = Callable[[StreamedAnswer, Token], None]
"""Called in the worker with the answer so far and its new token. It still has the answer if a request ends early."""


def ignore_token(answer: StreamedAnswer, token: Token) -> None:
    """An `OnToken` for callers that only want the whole answer."""


def streamed(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as `AsyncClient.stream` sends it."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


# -- filling the chunk cache -------------------------------------------------------------------------------------------

Outcome = Literal["warmed", "already_there", "too_short", "failed"]


@dataclass(frozen=True)
class ChunkOutcome:
    """What became of one chunk; `reason` says why it failed."""

    name: str
    outcome: Outcome
    reason: str = ""


def warm_request(model: str, texts: Sequence[str], separator: str, store: str = "all") -> dict[str, Any]:
    """The completion that puts chunks into the chunk cache: one token, after the chunks between separators.

    `store`: "scores" for what chunks show of each other, "seams" for what each is after the one before (docs/http.md).
    """
    return {
        "model": model,
        "prompt": join_chunks(texts, separator),
        "max_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {"kvarena": {"policy": "none", "store": store}},
    }


HELD, TOO_SHORT, UNMARKED, NOT_STORED, STORE_DOWN = "held", "too_short", "unmarked", "not_stored", "store_down"
OUTCOMES: dict[str, tuple[Outcome, str]] = {
    HELD: ("already_there", ""),
    TOO_SHORT: ("too_short", ""),
    UNMARKED: ("failed", "the separator was not found around it"),
    NOT_STORED: ("failed", "the store didn't keep it; it may be full"),
    STORE_DOWN: ("failed", "the store doesn't answer"),
}
STORE_WAIT_S = 12.0
"""For a store that was restarted, which a blend notices within seconds."""
STORE_POLL_S = 0.5
LOST_AGAIN = "the store kept it, but not until the end; it may be too small for all chunks"


def look_up_state(answer: Mapping[str, Any]) -> str:
    """`HELD`, or why a chunk isn't held, from the answer to a look-up in the store.

    A text that contains the separator is several chunks, and all of them have to be there.
    """
    if not answer["chunks"]:
        return UNMARKED
    kept = [chunk for chunk in answer["chunks"] if chunk.get("reason") != TOO_SHORT]
    missing = [str(chunk["reason"]) for chunk in kept if not chunk["held"]]
    return missing[0] if missing else HELD if kept else TOO_SHORT


def outcome_of(name: str, state: str) -> ChunkOutcome:
    return ChunkOutcome(name, *OUTCOMES.get(state, ("failed", state)))


# -- the clients -------------------------------------------------------------------------------------------------------


class AsyncClient:
    """Belongs to one event loop. Its methods raise `ClientError`. `timeout_s` is the longest silence of the server."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        import httpx

        self.url = url.removesuffix("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=bearer(api_key),
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S),
            trust_env=False,
            verify=not self.url.startswith("http://"),  # reading certificates that nobody shows takes 20 ms
        )

    async def get(self, path: str, timeout_s: float | None = None) -> Any:
        """The JSON at a path."""
        return await self._json("GET", path, None, timeout_s)

    async def text(self, path: str, timeout_s: float | None = None) -> str:
        """The text at a path."""
        return (await self._request("GET", path, None, timeout_s)).text

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float | None = None) -> Any:
        return await self._json("POST", path, body, timeout_s)

    async def describe(self, timeout_s: float | None = None) -> ServerInfo:
        """What the server is. Also readies the client for streams, so that no stream waits for that."""
        try:
            await self._request("GET", "/health", None, timeout_s)
        except Refused as error:
            if error.status >= 500:  # a server may outlive its engine; a 404 only means that there is no such path
                raise
        models = await self.get("/v1/models", timeout_s)
        try:
            offer = await self.get("/kvarena", timeout_s)
        except Refused as error:
            if error.status >= 500:
                raise
            offer = None
        _ = self._openai
        with _reading(models):
            model = models["data"][0]
            return ServerInfo(model["id"], model.get("root"), model.get("max_model_len"), offer)

    async def token_ids(self, prompt: Mapping[str, Any], timeout_s: float | None = None) -> list[int]:
        """Of a prompt in vLLM's form: the `model`, and a `prompt` or `messages`."""
        answer = await self.post("/tokenize", prompt, timeout_s)
        with _reading(answer):
            return [int(token) for token in answer["tokens"]]

    async def stream(
        self, path: str, body: Mapping[str, Any], on_token: OnToken = ignore_token, request_id: str = ""
    ) -> StreamedAnswer:
        """The answer to the `body` of a chat or a completion. `request_id` goes along as `X-Request-Id`.

        Cancelling it closes the connection, upon which the server stops generating.
        """
        import openai

        client = self._openai
        own = dict.fromkeys(("Authorization", "OpenAI-Organization", "OpenAI-Project"), openai.omit)
        headers = {**own, "X-Request-Id": request_id or openai.omit}
        answer = StreamedAnswer(time.perf_counter())
        with self._explained(self._timeout_s), _explained_by_openai():
            events = await client.post(
                path,
                cast_to=object,  # raw events: building models of them would take part of a fast token's time
                body=streamed(body),
                options={"headers": headers},
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
            async with events:
                async for event in events:
                    now_s = time.perf_counter()
                    with _reading(event):
                        tokens = list(answer.add(event, now_s))  # type: ignore[arg-type]
                    for token in tokens:
                        on_token(answer, token)
        answer.ended_s = time.perf_counter()
        if answer.finish_reason is None:
            num_tokens = len(answer.tokens)
            after = f"after {num_tokens} pieces of text" if num_tokens else "before its first token"
            raise StreamFailed(f"the stream ended {after}, without a finish")
        return answer

    async def report(self, request_id: str, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The request report of a contender that keeps reports, which may come a moment after the stream's end; None if
        it doesn't come.
        """
        for delay_s in REPORT_DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                report: dict[str, Any] = await self.get(f"/kvarena/requests/{request_id}", timeout_s)
            except Refused:
                continue
            return report
        return None

    async def lmcache_memory(self, timeout_s: float | None = None) -> Mapping[str, Any]:
        """From an LMCache server's own HTTP: how full its memory is, and what is locked in it."""
        status = await self.get("/status", timeout_s)
        try:
            memory: Mapping[str, Any] = status["storage_manager"]["l1_manager"]
        except (KeyError, TypeError) as error:
            raise Unexpected(f"answered in a form that is not LMCache's: {str(status)[:200]!r}") from error
        return memory

    async def warm(
        self,
        model: str,
        chunks: Sequence[TextChunk],
        separator: str,
        num_parallel: int,
        on_chunk: Callable[[ChunkOutcome], None],
    ) -> list[ChunkOutcome]:
        """Puts chunks into the chunk cache, a few at a time; one that is refused doesn't stop the others.

        The store is asked whether a chunk is there, and at the end once more, since later ones may have evicted it. A
        store that doesn't answer is given a little time. The worker calls `on_chunk` with each outcome as it comes, and
        again for a chunk that was lost. Cancelling leaves out what hasn't ended.
        """
        gate = asyncio.Semaphore(num_parallel)
        deadline_s = time.monotonic() + STORE_WAIT_S

        async def warm_one(chunk: TextChunk) -> ChunkOutcome:
            async with gate:
                outcome = await self._warm_chunk(model, chunk, separator, deadline_s)
            on_chunk(outcome)
            return outcome

        async def look_again(chunk: TextChunk, outcome: ChunkOutcome) -> ChunkOutcome:
            if outcome.outcome not in ("warmed", "already_there"):
                return outcome
            async with gate:
                lost = await self._lost_chunk(chunk, separator, deadline_s)
            if lost:
                on_chunk(lost)
            return lost or outcome

        outcomes = await asyncio.gather(*map(warm_one, chunks))
        return await asyncio.gather(*map(look_again, chunks, outcomes))

    async def warm_beginning(self, model: str, system: str, separator: str) -> None:
        """Puts into the chunk cache what comes before the first chunk of a chat: the template's own words and the
        system prompt. Does nothing if the model has no chat template.
        """
        request = warm_request(model, [], separator)
        del request["prompt"]
        messages = build_messages(system, [], separator, separator)
        with suppress(Refused):
            await self.post(CHAT, {**request, "messages": messages})

    async def score(
        self,
        model: str,
        chunks: Sequence[TextChunk],
        separator: str,
        on_prompt: Callable[[int, int], None],
    ) -> None:
        """Makes the server compute the scores of chunks that don't have them: which of their tokens need context.
        Prompts of several chunks are computed in full, which takes a few times as long as filling the cache.

        `on_prompt` gets how many prompts of how many are done.
        """
        lacking = [chunk.name for chunk in chunks if not await self._is_scored(chunk.text, separator)]
        contexts = contexts_for_scores(chunks, lacking, (await self.describe()).max_model_len)
        await self._compute_contexts(model, contexts, separator, "scores", on_prompt)

    async def make_seams(
        self,
        model: str,
        chunks: Sequence[TextChunk],
        separator: str,
        on_prompt: Callable[[int, int], None],
    ) -> None:
        """Makes the server compute each chunk once more, after the chunk before it, if it hasn't.

        `on_prompt` gets how many prompts of how many are done.
        """
        contexts = contexts_for_seams(chunks, (await self.describe()).max_model_len)
        await self._compute_contexts(model, contexts, separator, "seams", on_prompt)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _compute_contexts(
        self,
        model: str,
        contexts: Sequence[Sequence[TextChunk]],
        separator: str,
        store: str,
        on_prompt: Callable[[int, int], None],
    ) -> None:
        on_prompt(0, len(contexts))
        for number, context in enumerate(contexts, start=1):
            await self._compute_context(model, context, separator, store)
            on_prompt(number, len(contexts))

    async def _compute_context(self, model: str, context: Sequence[TextChunk], separator: str, store: str) -> None:
        """As a chat, like real requests, if the model has a chat template."""
        request = warm_request(model, [chunk.text for chunk in context], separator, store)
        prompt = request.pop("prompt")
        try:
            await self.post(CHAT, {**request, "messages": [{"role": "user", "content": prompt}]})
        except Refused:
            await self.post(COMPLETIONS, {**request, "prompt": prompt})

    async def _is_scored(self, text: str, separator: str) -> bool:
        """Or isn't there, so that there is nothing to keep scores with."""
        answer = await self.post(CHUNKS, {"prompt": join_chunks([text], separator), "scores": True})
        with _reading(answer):
            return all(bool(chunk.get("scored", True)) for chunk in answer["chunks"])

    async def _warm_chunk(self, model: str, chunk: TextChunk, separator: str, deadline_s: float) -> ChunkOutcome:
        try:
            before = await self._look_up(chunk.text, separator, deadline_s)
            if before != NOT_STORED:
                return outcome_of(chunk.name, before)
            await self.post(COMPLETIONS, warm_request(model, [chunk.text], separator))
            after = await self._look_up(chunk.text, separator, deadline_s)
        except ClientError as error:
            return ChunkOutcome(chunk.name, "failed", error.reason)
        return ChunkOutcome(chunk.name, "warmed") if after == HELD else outcome_of(chunk.name, after)

    async def _lost_chunk(self, chunk: TextChunk, separator: str, deadline_s: float) -> ChunkOutcome | None:
        try:
            state = await self._look_up(chunk.text, separator, deadline_s)
        except ClientError as error:
            return ChunkOutcome(chunk.name, "failed", error.reason)
        if state == HELD:
            return None
        return ChunkOutcome(chunk.name, "failed", LOST_AGAIN) if state == NOT_STORED else outcome_of(chunk.name, state)

    async def _look_up(self, text: str, separator: str, deadline_s: float) -> str:
        while True:
            answer = await self.post(CHUNKS, {"prompt": join_chunks([text], separator)})
            with _reading(answer):
                state = look_up_state(answer)
            if state != STORE_DOWN or time.monotonic() > deadline_s:
                return state
            await asyncio.sleep(STORE_POLL_S)

    @cached_property
    def _openai(self) -> openai.AsyncOpenAI:
        """Over our connections, which send the API key."""
        import openai

        http: Any = self._http
        client = openai.AsyncOpenAI(
            base_url=self.url, api_key="none", http_client=http, timeout=http.timeout, max_retries=0
        )
        client.platform_headers()  # collects, once, what every request says of this machine: takes milliseconds
        return client

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> Any:
        response = await self._request(method, path, body, timeout_s)
        with _reading(response.text):
            return response.json()

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> httpx.Response:
        timeout_s = timeout_s or self._timeout_s
        with self._explained(timeout_s):
            timeout = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s, timeout_s, timeout_s)
            response = await self._http.request(method, path, json=body, timeout=timeout)
        if response.is_error:
            raise Refused(response.status_code, error_message(response.text) or response.reason_phrase)
        return response

    @contextmanager
    def _explained(self, timeout_s: float) -> Iterator[None]:
        """Turns what `httpx` raises into `ClientError`."""
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(f"nothing answers at {self.url}") from error
        except httpx.TimeoutException as error:
            raise Silent(f"said nothing for {timeout_s:g} s; the request was given up") from error
        except httpx.HTTPError as error:
            raise ConnectionLost(
                f"the connection to {self.url} broke off ({type(error).__name__}); the server may have stopped"
            ) from error


def _in_worker(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The same method of a `Client`, which waits for it. An interrupt ends the work."""

    @wraps(method)
    def waiting(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        future = client.start(method(client.aio, *args, **kwargs))
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    return waiting


class Client:
    """An `AsyncClient` in a worker thread. Every method may be called from any thread, and raises `ClientError`."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self.aio = AsyncClient(url, api_key, timeout_s)
        self.url = self.aio.url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"client of {self.url}", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs what uses `aio` in the worker; cancelling the future ends it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    get = _in_worker(AsyncClient.get)
    post = _in_worker(AsyncClient.post)
    describe = _in_worker(AsyncClient.describe)
    token_ids = _in_worker(AsyncClient.token_ids)
    stream = _in_worker(AsyncClient.stream)
    report = _in_worker(AsyncClient.report)
    warm = _in_worker(AsyncClient.warm)
    warm_beginning = _in_worker(AsyncClient.warm_beginning)
    score = _in_worker(AsyncClient.score)
    make_seams = _in_worker(AsyncClient.make_seams)

    def close(self) -> None:
        """Cancels what is under way and ends the worker."""
        if not self._loop.is_closed():
            self.start(self._end()).result(CONNECT_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CONNECT_TIMEOUT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _end(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self.aio.aclose()


def connect(name: str, url: str, api_key: str = "", timeout_s: float = TIMEOUT_S) -> tuple[Client, ServerInfo]:
    """A client for a command line's server. Raises `ValueError` when nothing that speaks OpenAI's API answers there."""
    client = Client(url, api_key, timeout_s)
    try:
        return client, client.describe()
    except ClientError as error:
        client.close()
        if isinstance(error, Refused) and error.status == 401:
            key = "another one than this" if api_key else "not set here"
            raise ValueError(f"{name}: {client.url} wants {API_KEY_VARIABLE}, which is {key}") from error
        raise ValueError(f"{name}: no OpenAI server answers at {client.url} ({error})") from error


# -- reading answers ---------------------------------------------------------------------------------------------------


def error_message(body: Any) -> str:
    """The message in an error object of OpenAI's, vLLM's older or FastAPI's form, parsed or not; else the text."""
    found = body
    if isinstance(body, str):
        try:
            found = json.loads(body)
        except ValueError:
            found = body.strip()
    if isinstance(found, Mapping):
        error = found.get("error")
        message = error.get("message") if isinstance(error, Mapping) else error
        found = message or found.get("message") or found.get("detail") or found
    return str(found)[:MAX_DETAIL_CHARS]


@contextmanager
def _reading(answer: object) -> Iterator[None]:
    """Raises `Unexpected` if the answer hasn't the form that is read."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unexpected(f"answered in a form that is not the OpenAI API: {str(answer)[:200]!r}") from error


@contextmanager
def _explained_by_openai() -> Iterator[None]:
    """Turns what `openai` raises into `ClientError`, and a lost connection into its cause, which is `httpx`'s."""
    import httpx
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        said = error_message(error.response.text) or error.response.reason_phrase
        raise Refused(error.status_code, said) from error
    except openai.APIConnectionError as error:
        if isinstance(error.__cause__, httpx.HTTPError):
            raise error.__cause__ from None
        raise ConnectionLost(f"the connection broke off ({error.__cause__ or error})") from error
    except openai.APIError as error:
        raise StreamFailed(f"an error in the stream: {error_message(error.body or error.message)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unexpected(f"the stream has something that is no JSON ({error})") from error
