"""The streams of a soak run: what they ask, how they leave off, and what becomes of it.

A stream is a task that sends one request after the other. Some answers are read to their end, some are given up before
the first token or after a few, some are never read. Everything is drawn from a seed, so that the same seed makes the
same prompts and requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvarena.bench.variants import is_blend
from kvarena.client import CHAT, AsyncClient, ClientError, Refused, ServerInfo, StreamedAnswer, Token, bearer
from kvarena.documents import build_messages

SHORT_TOKENS, LONG_TOKENS = 12, 96
SPECIAL_TEXTS = ("<|im_start|>system\n", "</s>", "<s>", "<|endoftext|>", "[INST]", "<bos>")


@dataclass(frozen=True)
class Prompt:
    """`ignores_end`: the answer goes on to its `max_tokens`, so that there is time to abort it."""

    kind: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    ignores_end: bool

    def body(self, model: str) -> dict[str, Any]:
        """Of a chat request that asks for what answers are compared by."""
        return {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "ignore_eos": self.ignores_end,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 5,
        }


class PromptMaker:
    """Makes prompts out of the texts of documents. Raises `ValueError` where there are none."""

    def __init__(self, texts: Sequence[str], system: str, separator: str, max_model_len: int, seed: int) -> None:
        if not texts:
            raise ValueError("there are no documents to make prompts of")
        self._texts, self._system, self._separator = list(texts), system, separator
        self._words = sorted({word for text in texts for word in text.split()})
        self._max_model_len = max_model_len
        self._rng = random.Random(f"prompts {seed}")

    def prompts(self, num: int) -> list[Prompt]:
        """Of every kind in turn; one in three has a long answer."""
        kinds = list(KINDS)
        return [self._prompt(kinds[index % len(kinds)]) for index in range(num)]

    def _prompt(self, kind: str) -> Prompt:
        texts, question = KINDS[kind](self), self.some_words(6) + "?"
        messages = build_messages(self._system, texts, question, self._separator)
        is_long = self._rng.random() < 1 / 3
        return Prompt(kind, tuple(messages), LONG_TOKENS if is_long else SHORT_TOKENS, is_long)

    def some_words(self, num: int) -> str:
        return " ".join(self._rng.choices(self._words, k=num))

    def documents(self) -> list[str]:
        """Chunks of the data folder, which the stack has stored, in a new order."""
        return self._rng.sample(self._texts, min(len(self._texts), self._rng.randint(2, 6)))

    def made_up(self) -> list[str]:
        """Chunks that nobody has stored, between known ones."""
        new = [self.some_words(self._rng.randint(20, 120)) for _ in range(3)]
        return [new[0], self._rng.choice(self._texts), *new[1:]]

    def records(self) -> list[str]:
        """Lines that hardly differ, as in JSON or logs: hard for a search for known text."""
        lines = [
            json.dumps({"level": "info", "service": "store", "id": self._rng.randrange(10**9), "took_ms": number})
            for number in range(12)
        ]
        return ["\n".join(lines), "\n".join(reversed(lines))]

    def repetition(self) -> list[str]:
        chunk = self._rng.choice(self._texts)
        return [f"{self._rng.choice(self._words)} " * 150, chunk, chunk, chunk]

    def oddities(self) -> list[str]:
        """Empty and short texts, separators and special tokens within, other scripts."""
        known = self._rng.choice(self._texts)
        odd = [
            "",
            " ",
            "a",
            self._separator * 3,
            "日本語 🦜 Ünïcödé " * 8,
            *SPECIAL_TEXTS,
            known + self._separator + known,
        ]
        return self._rng.sample(odd, len(odd))

    def bare(self) -> list[str]:
        return []

    def too_long(self) -> list[str]:
        """More tokens than the model takes: a word is one at least."""
        return [self.some_words(self._max_model_len)]


KINDS: dict[str, Callable[[PromptMaker], list[str]]] = {
    "documents": PromptMaker.documents,
    "made up": PromptMaker.made_up,
    "records": PromptMaker.records,
    "repetition": PromptMaker.repetition,
    "odd": PromptMaker.oddities,
    "bare": PromptMaker.bare,
    "too long": PromptMaker.too_long,
}


Verdict = Literal["equal", "tie", "different"]
Entry = Mapping[str, Any]
EXACT: Mapping[str, Any] = {"ratio": 1.0}
BLENDS: Sequence[Mapping[str, Any]] = (
    {},
    {"ratio": 0.0},
    {"ratio": 0.3},
    {"policy": "chunk_head", "ratio": 0.1},
    {"policy": "query_attention"},
    {"policy": "none"},
    {"max_ttft_ms": 500},
)
WRONG = ("different", "failed", "hung", "without report")
"""Outcomes that may not be."""
ANSWER_ID_PREFIX = "chatcmpl-"
MAX_UNREAD = 8
MAX_FINDINGS = 50
RETRY_S = (0.5, 2.0)
LATE_REPORT_S = 3.0
RECEIVE_BUFFER_BYTES = 4096
UNREAD_TOKENS = 1000
TIE_MARGIN = 0.25
"""In logits: how far `plain` was from itself where another token came first, compiled and not (docs/running.md)."""


@dataclass(frozen=True)
class Reference:
    """What `plain` answers alone: the refusal's status, or the tokens with their log-probabilities and the finish."""

    status: int = 200
    entries: Sequence[Entry] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """`shift`: how far the log-probabilities of equal tokens are from the reference's. `gaps`, where another token
    comes first: by how much the reference prefers its own, and the answer its own.
    """

    verdict: Verdict
    shift: float
    gaps: tuple[float, float] = (0.0, 0.0)


def compared(answer: StreamedAnswer, reference: Reference, tie_margin: float, is_whole: bool) -> Comparison:
    """An answer that was given up is compared as far as it came.

    Another token is a tie where neither side prefers its own by more than `tie_margin`. Differences of
    log-probabilities are those of logits.
    """
    shift = 0.0
    for own, expected in zip(answer.logprobs, reference.entries, strict=False):
        if own["bytes"] != expected["bytes"]:
            gaps = _lead(expected, own), _lead(own, expected)
            return Comparison("tie" if max(gaps) <= tie_margin else "different", shift, gaps)
        shift = max(shift, abs(own["logprob"] - expected["logprob"]))
    end = (len(answer.logprobs), answer.finish_reason)
    is_equal = not is_whole or end == (len(reference.entries), reference.finish_reason)
    return Comparison("equal" if is_equal else "different", shift)


def _lead(entry: Entry, other: Entry) -> float:
    """How much likelier a token was than another one, where it came first."""
    others = [one["logprob"] for one in entry["top_logprobs"] if one["bytes"] == other["bytes"]]
    return float(entry["logprob"] - max(others, default=-math.inf))


@dataclass
class Target:
    """A contender under load. `down`: when its processes were killed until they were back; the last time may have no
    end yet. `reports` have figures only.
    """

    name: str
    client: AsyncClient
    info: ServerInfo
    api_key: str = ""
    down: list[tuple[float, float]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_ms: list[float] = field(default_factory=list)
    num_compared_tokens: int = 0
    largest_shift: float = 0.0
    largest_tie: float = 0.0
    reports: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    """By the time when their requests were sent."""
    unreported: dict[str, float] = field(default_factory=dict)
    """Requests whose reports haven't come, by their ids."""
    read_whole: set[str] = field(default_factory=set)
    """Requests whose answers came to their end."""

    @property
    def is_blend(self) -> bool:
        return is_blend(self.info)

    @property
    def has_reports(self) -> bool:
        return bool(self.info.contender)

    @property
    def alive_since(self) -> float:
        """When its processes were last killed; new ones answer what was sent later."""
        return max((start for start, _ in self.down), default=0.0)

    def was_down(self, sent_s: float, ended_s: float) -> bool:
        return any(start <= ended_s and sent_s <= end for start, end in self.down)

    async def fetch_report(self, request_id: str, sent_s: float) -> bool:
        with contextlib.suppress(ClientError):
            if report := await self.client.report(ANSWER_ID_PREFIX + request_id):
                figures = {name: value for name, value in report.items() if isinstance(value, int)}
                self.reports.append((sent_s, figures))
                return True
        return False


class _GivenUp(Exception):
    """The client leaves in the middle of an answer."""


@dataclass(frozen=True)
class Ask:
    """One request. `params`: of a blend. `tokens_read`: after so many the client leaves. `leaves_after_s`: it leaves
    then, whatever has come. `is_unread`: it stays, and reads nothing.
    """

    prompt: int
    salt: str = ""
    params: Mapping[str, Any] | None = None
    tokens_read: int | None = None
    leaves_after_s: float | None = None
    is_unread: bool = False

    @property
    def is_exact(self) -> bool:
        return self.params is None or self.params == EXACT


class Load:
    """Sends requests to targets, compares their answers with the references, and keeps count.

    `findings` says of the first wrong, failed and hanging ones which they were.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        prompts: Sequence[Prompt],
        references: Sequence[Reference],
        *,
        tie_margin: float,
        timeout_s: float,
        seed: int,
    ) -> None:
        self.targets = targets
        self.findings: list[str] = []
        self._prompts, self._references = prompts, references
        self._tie_margin, self._timeout_s, self._seed = tie_margin, timeout_s, seed
        self._name = f"soak-{time.time_ns():x}"
        self._num_sent = 0
        self._unread: list[asyncio.StreamWriter] = []
        self._late: set[asyncio.Task[None]] = set()

    async def run(self, phase: str, num_streams: int, seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(num_streams):
                group.create_task(self._stream(random.Random(f"{self._seed} {phase} {number}"), ends_s))

    async def _stream(self, rng: random.Random, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            target = rng.choices(self.targets, [3 if target.is_blend else 1 for target in self.targets])[0]
            if await self.send(target, self._draw(target, rng)) == "down":
                await asyncio.sleep(rng.uniform(*RETRY_S))

    def _draw(self, target: Target, rng: random.Random) -> Ask:
        """Half of a blend's requests are exact. A quarter of all are cold: their salt is new."""
        params = None
        if target.is_blend:
            params = EXACT if rng.random() < 0.5 else rng.choice(BLENDS)
        salt = f"cold {self._seed} {rng.random()}" if rng.random() < 0.25 else ""
        ask = Ask(rng.randrange(len(self._prompts)), salt, params)
        end = rng.random()
        if end < 0.1:
            return replace(ask, tokens_read=rng.randint(1, 40))
        if end < 0.15:
            return replace(ask, leaves_after_s=rng.uniform(0, 2))
        if end < 0.16 and len(self._unread) < MAX_UNREAD:
            return replace(ask, is_unread=True)
        return ask

    def cold_ask(self, rng: random.Random) -> Ask:
        """For a blend: the chunks of a prompt that isn't refused, under a new salt."""
        answered = [index for index, reference in enumerate(self._references) if reference.status == 200]
        return Ask(rng.choice(answered), f"filling {self._seed} {rng.random()}", EXACT)

    async def send(self, target: Target, ask: Ask) -> str:
        self._num_sent += 1
        request_id = f"{self._name}-{self._num_sent}"
        body = self._prompts[ask.prompt].body(target.info.model)
        if ask.salt:
            body["cache_salt"] = ask.salt
        if ask.params is not None:
            body["kv_transfer_params"] = {"kvarena": dict(ask.params)}
        sent_s = time.monotonic()
        if ask.is_unread:
            outcome = await self._leave_unread(target, body, request_id)
        else:
            outcome = await self._read(target, ask, body, request_id)
        target.outcomes[outcome] += 1
        if not target.has_reports or outcome in ("refused", "failed", "down"):
            return outcome
        is_whole = request_id in target.read_whole
        if not is_whole or not await target.fetch_report(request_id, sent_s):
            target.unreported[request_id] = sent_s
            # A request that was given up ends within some steps of the engine.
            task = asyncio.create_task(self._fetch(target, request_id, LATE_REPORT_S))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        return outcome

    async def _read(self, target: Target, ask: Ask, body: Mapping[str, Any], request_id: str) -> str:
        sent_s = time.monotonic()
        reference = self._references[ask.prompt]
        latest = StreamedAnswer(time.perf_counter())

        def read(answer: StreamedAnswer, token: Token) -> None:
            nonlocal latest
            latest = answer
            if ask.tokens_read is not None and len(answer.tokens) >= ask.tokens_read:
                raise _GivenUp

        is_whole = False
        try:
            async with asyncio.timeout(self._timeout_s if ask.leaves_after_s is None else ask.leaves_after_s):
                latest = await target.client.stream(CHAT, body, read, request_id)
            is_whole = True
            target.read_whole.add(request_id)
        except _GivenUp:
            pass
        except TimeoutError:
            if ask.leaves_after_s is None:
                self._find(target, ask, request_id, f"no end within {self._timeout_s:g} s")
                return "hung"
        except Refused as error:
            if error.status == reference.status:
                return "refused"
            return self._failed(target, ask, request_id, error, sent_s)
        except ClientError as error:
            return self._failed(target, ask, request_id, error, sent_s)
        if latest.tokens:
            target.ttft_ms.append(latest.ttft_ms)
        if ask.is_exact:
            found = compared(latest, reference, self._tie_margin, is_whole)
            target.largest_shift = max(target.largest_shift, found.shift)
            target.num_compared_tokens += min(len(latest.logprobs), len(reference.entries))
            if found.verdict == "tie":
                target.largest_tie = max(target.largest_tie, *found.gaps)
            if found.verdict == "different":
                said, expected = ("".join(e["token"] for e in es) for es in (latest.logprobs, reference.entries))
                ahead = "at the first other token ahead by {:.4f} alone, by {:.4f} here".format(*found.gaps)
                what = f"answers {said!r} ({latest.finish_reason}), alone {expected!r}; {ahead}"
                self._find(target, ask, request_id, what)
            if is_whole or found.verdict == "different":
                return found.verdict
        return "approximate" if is_whole else "given up"

    def _failed(self, target: Target, ask: Ask, request_id: str, error: ClientError, sent_s: float) -> str:
        """A server that was killed may leave requests unanswered, if the client learns it at once."""
        is_own_refusal = isinstance(error, Refused) and error.status < 500
        if not is_own_refusal and target.was_down(sent_s, time.monotonic()):
            return "down"
        self._find(target, ask, request_id, str(error))
        return "failed"

    async def _leave_unread(self, target: Target, body: Mapping[str, Any], request_id: str) -> str:
        """Sends a request over a connection of its own, and never reads from it."""
        address = urllib.parse.urlsplit(target.client.url)
        content = json.dumps({**body, "stream": True, "max_tokens": UNREAD_TOKENS, "ignore_eos": True}).encode()
        headers = {"Host": address.netloc, "Content-Type": "application/json", "Content-Length": str(len(content))}
        headers |= {"X-Request-Id": request_id, **bearer(target.api_key)}
        lines = [f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        raw.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(raw, (address.hostname, address.port))
            _, writer = await asyncio.open_connection(sock=raw, limit=RECEIVE_BUFFER_BYTES)
        except OSError:
            raw.close()
            return "down"
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        self._unread.append(writer)
        return "unread"

    async def _fetch(self, target: Target, request_id: str, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        sent_s = target.unreported.get(request_id)
        if sent_s is not None and await target.fetch_report(request_id, sent_s):
            target.unreported.pop(request_id, None)

    async def finds_again(self, target: Target) -> int:
        """How many chunks a blend finds that it was sent just before, in requests with nothing else in common.

        The first one stores them, even where the store is full and only takes what comes again.
        """
        num_before, salt = len(target.reports), f"again {time.time_ns()}"
        documents = next(index for index, prompt in enumerate(self._prompts) if prompt.kind == "documents")
        for params in ({"policy": "none", "store": "all"}, EXACT):
            await self.send(target, Ask(documents, salt, params))
        return sum(report["store_hits"] for _, report in target.reports[num_before:])

    async def end(self) -> None:
        """Closes what was never read, and waits for reports that are still to come. Those of a server that was killed
        are gone.
        """
        for writer in self._unread:
            writer.transport.abort()
        self._unread.clear()
        if self._late:
            await asyncio.wait(self._late)
        await asyncio.sleep(LATE_REPORT_S)
        for target in self.targets:
            waiting = {name: sent_s for name, sent_s in target.unreported.items() if sent_s >= target.alive_since}
            target.unreported = waiting
            await asyncio.gather(*(self._fetch(target, request_id) for request_id in list(waiting)))
            target.outcomes["without report"] = len(target.unreported.keys() & target.read_whole)

    def _find(self, target: Target, ask: Ask, request_id: str, what: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            kind = self._prompts[ask.prompt].kind
            asked = f"{'cold, ' if ask.salt else ''}{dict(ask.params) if ask.params else 'as it is'}"
            self.findings.append(f"{target.name}, prompt {ask.prompt} ({kind}; {asked}), {request_id}: {what}")


async def ask_alone(client: AsyncClient, model: str, prompt: Prompt, timeout_s: float) -> Reference:
    """The reference's answer. Raises `ClientError` where it has none, not even a refusal."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await client.stream(CHAT, prompt.body(model))
    except Refused as error:
        if error.status < 500:
            return Reference(error.status)
        raise
    return Reference(200, answer.logprobs, answer.finish_reason)
