"""What `prefix_bench` can measure: an engine in this process, or the `prefix` contender at an address."""

from __future__ import annotations

import uuid
from time import perf_counter
from typing import Any

import httpx

from kvarena.api.engine import GenerationRequest, Sampling
from kvarena.api_key import bearer
from kvarena.bench.prefix_bench import Timed
from kvarena.engines.prefix.engine import PrefixEngine
from kvarena.engines.prefix.options import PrefixOptions

TIMEOUT_S = 600.0


class InProcess:
    """Timed from the call to the first token and to the last, as the caller of the engine sees it."""

    def __init__(self, engine: PrefixEngine) -> None:
        self._engine = engine

    def count(self, text: str) -> int:
        return len(self._engine.tokenizer.encode(text))

    def generate(self, prompt: str, max_new_tokens: int, options: dict[str, bool]) -> Timed:
        sampling = Sampling(max_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(uuid.uuid4().hex, prompt, sampling, options=PrefixOptions(**options))
        started_s, first_s, num_tokens = perf_counter(), 0.0, 0
        generation = self._engine.generate(request)
        for _ in generation:
            num_tokens += 1
            first_s = first_s or perf_counter()
        ended_s, report = perf_counter(), generation.report
        return Timed(
            first_token_ms=1000 * (first_s - started_s),
            total_ms=1000 * (ended_s - started_s),
            num_answer_tokens=num_tokens,
            num_prompt_tokens=report.num_prompt_tokens,
            num_reused_tokens=report.num_reused_tokens,
        )


class Server:
    """Timed by the server: `/generate` answers as a whole. Raises `ValueError` when the address is no `prefix`."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=bearer(api_key), trust_env=False)
        try:
            described = self._http.get("/kvarena")
        except httpx.HTTPError as error:
            raise ValueError(f"{url} doesn't answer: {error}") from error
        if described.is_error or described.json().get("contender") != "prefix":
            raise ValueError(f"{url} is not a prefix contender")

    def count(self, text: str) -> int:
        return int(self._post("/tokenize", {"prompt": text})["count"])

    def generate(self, prompt: str, max_new_tokens: int, options: dict[str, bool]) -> Timed:
        body = {"prompt": prompt, "max_new_tokens": max_new_tokens, "ignore_eos": True, **options}
        answer = self._post("/generate", body)
        timings = answer["timings"]
        return Timed(
            first_token_ms=timings["first_token_ms"],
            total_ms=timings["total_ms"],
            num_answer_tokens=answer["num_answer_tokens"],
            num_prompt_tokens=answer["num_prompt_tokens"],
            num_reused_tokens=timings["prefix_tokens_saved"],
        )

    def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        reply = self._http.post(path, json=body)
        if reply.is_error:
            raise ValueError(f"{path} answered {reply.status_code}: {reply.text[:500]}")
        answer: dict[str, Any] = reply.json()
        return answer
