"""Fills the chunk cache: every chunk of a folder is sent once to the blend, which keeps its KV.

Goes through the public API (`warm_request.py`). The request report in each answer says whether the chunk was computed
now or was there already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx

from kvarena.api_key import bearer
from kvarena.documents import Remark, TextChunk
from kvarena.stack.errors import StackError
from kvarena.warm_request import WARM_PATH, ChunkOutcome, Outcome, warm_outcome, warm_request

PARALLEL_REQUESTS = 4
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class WarmResult:
    """A chunk is too short when it has so few tokens that the blend doesn't keep it: it is computed each time.

    `unusable` are the folder's files that no chunks could be made of.
    """

    outcomes: tuple[ChunkOutcome, ...]
    unusable: tuple[Remark, ...] = ()

    def chunks(self, outcome: Outcome) -> tuple[ChunkOutcome, ...]:
        return tuple(chunk for chunk in self.outcomes if chunk.outcome == outcome)

    def count(self, outcome: Outcome) -> int:
        return len(self.chunks(outcome))

    @property
    def failures(self) -> tuple[ChunkOutcome, ...]:
        return self.chunks("failed")

    def to_json(self) -> dict[str, Any]:
        return {
            "num_chunks": len(self.outcomes),
            "num_warmed": self.count("warmed"),
            "num_already_there": self.count("already_there"),
            "num_too_short": self.count("too_short"),
            "num_failed": self.count("failed"),
            "too_short": [chunk.name for chunk in self.chunks("too_short")],
            "failures": [{"chunk": failed.name, "reason": failed.reason} for failed in self.failures],
            "unusable": [{"file": remark.file, "reason": remark.text} for remark in self.unusable],
        }


def warm(
    base_url: str,
    model: str,
    chunks: Sequence[TextChunk],
    on_chunk: Callable[[ChunkOutcome], None] = lambda outcome: None,
    api_key: str = "",
) -> WarmResult:
    """Sends the chunks, a few at a time; one that is refused doesn't stop the others.

    `on_chunk` is called after each. Raises `httpx.HTTPError` when the server doesn't answer at all, or isn't a blend,
    and `StackError` when it serves its model without blending, isn't ours, or asks for another key.
    """
    with (
        httpx.Client(base_url=base_url, headers=bearer(api_key), timeout=REQUEST_TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(PARALLEL_REQUESTS) as pool,
    ):
        offer = client.get("/kvarena")
        if offer.status_code == httpx.codes.NOT_FOUND:
            raise StackError("LMCache's own blender has no chunk cache to fill ahead: it stores what requests bring")
        if offer.status_code == httpx.codes.UNAUTHORIZED:
            raise StackError(f"{base_url} refuses KVARENA_API_KEY: {error_message(offer)}")
        described = offer.raise_for_status().json()
        if not described.get("blends", True):
            raise StackError(f"the chunk cache stays empty: {described.get('reason')}")
        separator = str(described.get("separator", ""))
        running = [pool.submit(_warm_chunk, client, model, chunk, separator) for chunk in chunks]
        for warmed in as_completed(running):
            on_chunk(warmed.result())
        return WarmResult(tuple(warmed.result() for warmed in running))


def _warm_chunk(client: httpx.Client, model: str, chunk: TextChunk, separator: str) -> ChunkOutcome:
    try:
        response = client.post(WARM_PATH, json=warm_request(model, chunk.text, separator))
        if response.is_error:
            return ChunkOutcome(chunk.name, "failed", error_message(response))
        return warm_outcome(chunk.name, response.json())
    except (httpx.HTTPError, ValueError) as error:
        return ChunkOutcome(chunk.name, "failed", str(error) or type(error).__name__)


def error_message(response: httpx.Response) -> str:
    """The message of an OpenAI error object, or what else the answer has."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}: {response.text[:200]}".strip()
