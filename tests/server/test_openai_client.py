"""OpenAI's own client against a real server: what it reads is what was generated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.real_server import RealServer
from support.scripted_engine import ScriptedEngine, tokenizer

TEXT = "river stone 🦜 Ünï tea\tmarket"
scripts = st.text("ab ü🦜#", min_size=1, max_size=24).map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def api(real: RealServer[ScriptedEngine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def messages(text: str) -> list[Any]:
    return [{"role": "system", "content": "You say it."}, {"role": "user", "content": f"say {text}"}]


END = 1
"""The end-of-sequence token counts as the others do."""


def num_tokens(text: str) -> int:
    return len(tokenizer().encode(text, add_special_tokens=False))


def test_chat(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=messages(TEXT))
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.completion_tokens == num_tokens(TEXT) + END
    assert answer.usage.prompt_tokens == num_tokens(f"You say it.\nsay {TEXT}\n")
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 2
    report = answer.model_dump()["kv_transfer_params"]["kvarena"]
    assert report["request_id"] == answer.id
    assert report["num_reused_tokens"] + report["num_computed_tokens"] == report["num_prompt_tokens"]


def test_streamed_chat(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="tiny", messages=messages(TEXT), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == num_tokens(TEXT) + END
    assert len({chunk.id for chunk in chunks}) == 1


def test_streamed_text_has_no_usage_unless_asked(api: openai.OpenAI) -> None:
    chunks = list(api.completions.create(model="tiny", prompt=f"say {TEXT}", stream=True, max_tokens=100))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert all(chunk.usage is None for chunk in chunks)


def test_max_tokens(api: openai.OpenAI) -> None:
    limits: list[dict[str, Any]] = [{"max_tokens": 2}, {"max_completion_tokens": 2}]
    for limit in limits:
        answer = api.chat.completions.create(model="tiny", messages=messages("river stone tea"), **limit)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("riv", "length")
    usage = api.completions.create(model="tiny", prompt="say " + "tea" * 50).usage
    assert usage is not None
    assert usage.completion_tokens == 16


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(scripts, st.lists(st.text("ab ü🦜#", min_size=1, max_size=3), max_size=4), st.booleans())
def test_streamed_and_not_are_the_same(api: openai.OpenAI, text: str, stops: list[str], include: bool) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": f"say {text}", "max_tokens": 200, "stop": stops}
    request["extra_body"] = {"include_stop_str_in_output": include}
    whole = api.completions.create(**request).choices[0]
    chunks = list(api.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    if include or not any(stop in text for stop in stops):
        assert text.startswith(whole.text)
    else:
        assert not any(stop in whole.text for stop in stops)


def test_a_stop_string_ends_the_generation(api: openai.OpenAI, real: RealServer[ScriptedEngine]) -> None:
    answer = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "forever"}], stop="xxx")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage
    assert answer.usage.completion_tokens == 3
    assert not real.engine.open


def test_several_prompts_and_samples(api: openai.OpenAI, real: RealServer[ScriptedEngine]) -> None:
    answer = api.completions.create(model="tiny", prompt=["say tea", "say rain"], n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["tea", "tea", "rain", "rain"]
    assert answer.usage
    assert answer.usage.prompt_tokens == num_tokens("say tea") + num_tokens("say rain")
    assert answer.usage.completion_tokens == 2 * (num_tokens("tea") + END + num_tokens("rain") + END)
    asked = sorted(real.engine.requests[-4:], key=lambda request: request.request_id)
    assert [request.sampling.seed for request in asked] == [7, 8, 7, 8]
    report = answer.model_dump()["kv_transfer_params"]["kvarena"]
    assert (
        report["num_prompt_tokens"]
        == 2 * answer.usage.prompt_tokens
        == sum(choice["num_prompt_tokens"] for choice in report["choices"])
    )


def test_several_prompts_streamed(api: openai.OpenAI) -> None:
    prompts = [tokenizer().encode(f"say {word}") for word in ("tea", "rain stone", "old")]
    texts = ["", "", ""]
    for chunk in api.completions.create(model="tiny", prompt=prompts, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["tea", "rain stone", "old"]


def test_chat_logprobs(api: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": messages("tea 🦜"), "logprobs": True, "top_logprobs": 20}
    logprobs = api.chat.completions.create(**request).choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode() == "tea 🦜</s>"
    assert {len(token.top_logprobs) for token in logprobs.content} == {20}
    assert logprobs.content[0].logprob == logprobs.content[0].top_logprobs[0].logprob == -0.5
    streamed = [
        token
        for chunk in api.chat.completions.create(**request, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == logprobs.content


def test_text_logprobs(api: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": "say tea rain old", "logprobs": 2}
    for chunks in ([api.completions.create(**how)], api.completions.create(**how, stream=True)):
        found = [chunk.choices[0].logprobs for chunk in chunks]
        assert [token for part in found for token in part.tokens] == ["tea", " rain", " old", "</s>"]
        assert [offset for part in found for offset in part.text_offset] == [0, 3, 8, 12]
        assert next(list(top) for part in found for top in part.top_logprobs) == ["tea", " lam"]


def test_a_model_that_is_not_there(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        api.completions.create(model="other", prompt="say tea")


def test_an_engine_that_fails(api: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="engine failed while serving request cmpl-"):
        api.completions.create(model="tiny", prompt="fail")
    with pytest.raises(openai.APIError, match="engine failed while serving request cmpl-"):
        list(api.completions.create(model="tiny", prompt="break tea rain old paper", stream=True))


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").model_dump()["max_model_len"] == 4096


def test_thirty_two_streams_at_once(api: openai.OpenAI) -> None:
    texts = [f"tea {index} river stone " + "rain " * index + "end" for index in range(32)]

    def ask(text: str) -> str:
        stream = api.chat.completions.create(model="tiny", messages=messages(text), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, texts)) == texts


def test_usage_in_every_chunk(api: openai.OpenAI) -> None:
    """The tokens so far, also of those that are no text yet; nothing without the usage at the end, as in vLLM."""
    request: dict[str, Any] = {"model": "tiny", "prompt": ["say tea 🦜", "say rain"], "stream": True}
    told: dict[str, Any] = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = list(api.completions.create(**request | told))
    for index, text in enumerate(("tea 🦜", "rain")):
        usages = [chunk.usage for chunk in chunks if chunk.choices[0].index == index]
        assert [usage and usage.completion_tokens for usage in usages] == [
            *range(1, num_tokens(text) + END + 1),
            num_tokens(text) + END,  # with the finish reason
        ]
        assert {usage and usage.prompt_tokens for usage in usages} == {num_tokens(request["prompt"][index])}
    assert last.usage
    assert last.usage.completion_tokens == num_tokens("tea 🦜") + num_tokens("rain") + 2 * END

    chat: dict[str, Any] = {"model": "tiny", "messages": messages("tea"), "stream": True}
    opening = next(iter(api.chat.completions.create(**chat | told)))
    assert opening.usage
    assert (opening.usage.completion_tokens, opening.usage.prompt_tokens > 0) == (0, True)
    only = {"stream_options": {"continuous_usage_stats": True}}
    assert all(chunk.usage is None for chunk in api.chat.completions.create(**chat | only))
