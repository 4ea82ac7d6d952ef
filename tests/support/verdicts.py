"""What a server says to a request's body: one table for every contender.

The verdicts are vLLM 0.32's own: `tests/server/test_verdicts.py` puts the table to its request models and to our three
servers, `tests/e2e` to the running ones. `fields` stand beside those of a small good request; `None` for a field of it
leaves that out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "tea"}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 2, "temperature": 0.5, "seed": 1},
    TEXT: {"prompt": "tea", "max_tokens": 2, "temperature": 0.5, "seed": 1},
}


@dataclass(frozen=True)
class Case:
    path: str
    fields: dict[str, Any]
    status: int
    code: str | None = None

    def __str__(self) -> str:
        return f"{self.path.removeprefix('/v1/').replace('/', '-')}:{json.dumps(self.fields)[:60]}"

    @property
    def body(self) -> dict[str, Any]:
        return GOOD[self.path] | self.fields


def _of(path: str, status: int, *fields: dict[str, Any]) -> list[Case]:
    return [Case(path, each, status) for each in fields]


def _of_both(status: int, *fields: dict[str, Any]) -> list[Case]:
    return _of(CHAT, status, *fields) + _of(TEXT, status, *fields)


def _messages(status: int, *messages: object) -> list[Case]:
    return _of(CHAT, status, *({"messages": [message]} for message in messages))


def _call(**function: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "brew", "arguments": "{}", **function}}


def _content(status: int, *contents: object) -> list[Case]:
    return _messages(status, *({"role": "user", "content": content} for content in contents))


CALL, SAYS = _call(), {"role": "assistant", "content": "tea"}
USAGE = {"include_usage": True}
TABLE: list[Case] = [
    # Numbers and switches, as far as they can be converted.
    *_of_both(200, {"max_tokens": 2.0}, {"max_tokens": "2"}, {"max_tokens": True}, {"max_tokens": None}),
    *_of_both(400, {"max_tokens": 1.5}, {"max_tokens": "two"}, {"max_tokens": 0}, {"max_tokens": -5}),
    *_of_both(400, {"max_tokens": 10**30}, {"max_tokens": [2]}, {"max_tokens": {}}),
    *_of(CHAT, 200, {"max_tokens": -1, "max_completion_tokens": 2}),
    *_of(CHAT, 400, {"max_completion_tokens": 0}),
    *_of_both(200, {"temperature": 2}, {"temperature": "0.5"}, {"temperature": True}, {"temperature": None}),
    *_of_both(400, {"temperature": 2.1}, {"temperature": -0.1}, {"temperature": "warm"}, {"temperature": 10**400}),
    *_of_both(200, {"top_p": 1}, {"top_p": "0.5"}),
    *_of_both(400, {"top_p": 0}, {"top_p": 1.1}),
    *_of_both(200, {"seed": -1}, {"seed": 2**63 - 1}, {"seed": "7"}),
    *_of_both(400, {"seed": 2**63}, {"seed": 0.5}),
    *_of_both(200, {"n": 2}, {"n": "2"}, {"n": 130, "max_tokens": 1}),
    *_of_both(400, {"n": 0}, {"n": 16385}, {"n": 2, "temperature": 0}),
    *_of(CHAT, 200, {"n": None}),
    *_of(TEXT, 400, {"n": None}),
    *_of_both(200, {"stream": "false"}, {"stream": 0}, {"stream": None}, {"ignore_eos": "yes"}),
    *_of_both(400, {"stream": "perhaps"}, {"stream": 2}, {"ignore_eos": None}),
    *_of_both(200, {"stream_options": {}}, {"stream": "false", "stream_options": USAGE}),
    *_of_both(400, {"stream_options": USAGE}, {"stream": False, "stream_options": USAGE}, {"stream_options": 3}),
    # Stop strings and salts.
    *_of_both(200, {"stop": ["a"] * 4}, {"stop": []}, {"stop": None}, {"stop": "x" * 2000}),
    *_of_both(400, {"stop": ["a"] * 5}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": 3}, {"stop": [3]}),
    *_of_both(200, {"cache_salt": "a" * 128}, {"cache_salt": "ä b+c="}, {"cache_salt": None}),
    *_of_both(400, {"cache_salt": "a" * 129}, {"cache_salt": ""}, {"cache_salt": 3}),
    *_of_both(400, {"cache_salt": "a@b"}, {"cache_salt": "a/b"}, {"cache_salt": "a\\b"}, {"cache_salt": "a\0b"}),
    # Messages.
    *_of(CHAT, 400, {"messages": []}, {"messages": None}, {"messages": "tea"}, {"messages": {}}),
    *_messages(400, {}, {"content": "tea"}, {"role": None, "content": "tea"}, {"role": 3, "content": "tea"}, "tea", 3),
    *_messages(200, {"role": "banana", "content": "tea"}, {"role": "assistant", "content": None}),
    *_content(400, None, 3, True, {"a": 1}, ["tea"], [None], [{"text": "tea"}], [{"type": "text"}]),
    *_content(400, [{"type": "text", "text": 3}], [{"type": "banana", "text": "tea"}]),
    *_content(200, [{"type": "text", "text": "tea", "more": 1}], [{"type": "refusal", "refusal": "no tea"}]),
    *_messages(200, {**USER, "more": 3}, {**USER, "tool_calls": []}),
    *_messages(400, {**USER, "name": 3}, {"role": "system", "content": None}),
    # Of an assistant, and left out of others'; arguments that are no JSON are none.
    *_messages(200, {**SAYS, "tool_calls": [CALL]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    *_messages(200, {**SAYS, "tool_calls": {}}, {**SAYS, "tool_calls": [_call(arguments="{")]}),
    *_messages(200, {**SAYS, "tool_calls": None}, {**USER, "tool_calls": [{}]}, {**USER, "tool_calls": "x"}),
    *_messages(400, {**SAYS, "tool_calls": 3}, {**SAYS, "tool_calls": "x"}, {**USER, "tool_calls": 3}),
    *_messages(400, {**SAYS, "tool_calls": [{}]}, {**SAYS, "tool_calls": [{**CALL, "type": "banana"}]}),
    *_messages(400, {**SAYS, "tool_calls": [_call(arguments={})]}, {**SAYS, "tool_calls": [_call(name=3)]}),
    *_messages(200, {"role": "tool", "content": "tea"}, {"role": "tool", "content": "tea", "tool_call_id": "1"}),
    *_messages(400, {"role": "tool", "content": "tea", "tool_call_id": 3}),
    *_messages(200, {**SAYS, "thinking": "hot"}, {**SAYS, "thinking": 3}, {**SAYS, "reasoning": "hot"}),
    *_content(200, [{"type": "thinking", "thinking": "hot"}, {"type": "text", "text": "tea"}]),
    *_content(400, [{"type": "thinking"}], [{"type": "thinking", "thinking": 3}]),
    *_of(CHAT, 200, {"continue_final_message": True, "add_generation_prompt": False}),
    *_of(CHAT, 400, {"continue_final_message": True}, {"continue_final_message": True, "add_generation_prompt": True}),
    *_of(CHAT, 400, {"chat_template": "x"}, {"chat_template_kwargs": {"chat_template": "x"}}),
    *_of(CHAT, 200, {"chat_template_kwargs": {"more": 1}}, {"chat_template_kwargs": {"tokenize": True}}),
    *_of(CHAT, 200, {"documents": [{"title": "tea", "text": "hot"}]}, {"reasoning_effort": "high"}),
    *_of(CHAT, 400, {"documents": [{"title": 3}]}, {"reasoning_effort": "much"}),
    # Prompts, and the context's end.
    *_of(TEXT, 400, {"prompt": None}, {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [""]}),
    *_of(TEXT, 400, {"prompt": ["tea", ""]}, {"prompt": ["tea", 1]}, {"prompt": [1.5]}, {"prompt": [-1]}),
    *_of(TEXT, 400, {"prompt": [10**30]}, {"prompt": 3}, {"prompt": {"a": 1}}, {"prompt": ["tea"] * 1025}),
    *_of(TEXT, 200, {"prompt": [3, 4]}, {"prompt": [[3], [4]]}, {"prompt": ["tea", "rain"]}, {"prompt": [True]}),
    *_of(TEXT, 200, {"prompt": [3.0]}),
    # Logprobs.
    *_of(TEXT, 200, {"logprobs": 0}, {"logprobs": 20}, {"logprobs": True}, {"logprobs": 3.0}, {"logprobs": None}),
    *_of(TEXT, 400, {"logprobs": 21}, {"logprobs": -1}, {"logprobs": "3"}, {"logprobs": 0.5}),
    *_of(CHAT, 200, {"logprobs": True, "top_logprobs": 20}, {"logprobs": "true"}, {"top_logprobs": 0}),
    *_of(CHAT, 200, {"top_logprobs": None}, {"logprobs": True, "top_logprobs": None}),
    *_of(CHAT, 400, {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 1}, {"logprobs": 2}),
    # What isn't known, and what asks for nothing.
    *_of_both(200, {"not_known": [1, 2]}, {"best_of": 3}, {"functions": [{}]}, {"metadata": {"a": "b"}}),
    *_of_both(200, {"presence_penalty": 0}, {"top_k": -1}, {"logit_bias": {}}, {"response_format": {"type": "text"}}),
    *_of_both(200, {"min_p": "0"}, {"repetition_penalty": 1}, {"thinking_token_budget": -1}, {"length_penalty": 7}),
    *_of_both(200, {"user": "me"}, {"session_id": None}, {"priority": 0}, {"kv_transfer_params": {}}),
    *_of_both(400, {"top_k": -2}, {"logit_bias": {"a": 1}}, {"presence_penalty": 3}, {"min_tokens": -1}),
    *_of_both(400, {"user": 3}, {"kv_transfer_params": 3}, {"bad_words": None}, {"vllm_xargs": {"a": None}}),
    *_of_both(400, {"allowed_token_ids": []}, {"truncation_side": "up"}, {"stream_interval": 0}),
    *_of(CHAT, 200, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": None}),
    *_of(CHAT, 400, {"tools": []}, {"tool_choice": "auto"}, {"parallel_tool_calls": "perhaps"}),
    # Models.
    *_of_both(200, {"model": ""}, {"model": None}),
    *_of_both(404, {"model": "other"}),
    *_of_both(400, {"model": 3}),
]

BEYOND: list[Case] = [
    *_of_both(400, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 0.5}, {"frequency_penalty": -1}),
    *_of_both(400, {"repetition_penalty": 1.1}, {"logit_bias": {"3": 1}}, {"min_tokens": 1}, {"bad_words": ["x"]}),
    *_of_both(400, {"stop_token_ids": [3]}, {"allowed_token_ids": [3]}, {"skip_special_tokens": False}),
    *_of_both(400, {"response_format": {"type": "json_object"}}, {"truncate_prompt_tokens": 3}, {"echo": True}),
    *_of_both(400, {"return_token_ids": True}, {"return_tokens_as_token_ids": True}, {"use_beam_search": True}),
]
"""What vLLM honours and the project's own engines can't: these servers say so."""


def context_cases(max_model_len: int) -> list[Case]:
    """A token id is said as often as it takes; 3 is in every vocabulary."""
    ids = [3] * max_model_len
    return [
        # With a seed, long prompts would end a stock vLLM on a CPU (docs/upstream.md).
        Case(TEXT, {"prompt": ids[2:], "max_tokens": 3, "seed": None}, 200),
        Case(TEXT, {"prompt": ids[1:], "max_tokens": max_model_len, "seed": None}, 200),
        Case(TEXT, {"max_tokens": max_model_len + 1}, 400),
        Case(TEXT, {"prompt": ids}, 400),
        Case(TEXT, {"prompt": [*ids, 3]}, 400, "context_length_exceeded"),
        Case(TEXT, {"prompt": [[3], [*ids, 3]]}, 400, "context_length_exceeded"),
        Case(TEXT, {"prompt": "tea " * max_model_len}, 400, "context_length_exceeded"),
        Case(CHAT, {"messages": [{"role": "user", "content": "tea " * max_model_len}]}, 400, "context_length_exceeded"),
    ]


JSON = "application/json"
RAW: list[tuple[bytes, str, int]] = [
    (b"", JSON, 400),
    (b"{", JSON, 400),
    (b"[1]", JSON, 400),
    (b"null", JSON, 400),
    (b'{"prompt": "\xff"}', JSON, 400),
    (b'{"prompt": "\\ud800"}', JSON, 400),
    (b'{"prompt": NaN}', JSON, 400),
    (b'{"prompt": "tea", "max_tokens": 2, "seed": ' + b"9" * 5000 + b"}", JSON, 400),
    (b'{"prompt": "tea", "max_tokens": 2, "more": NaN}', JSON, 200),
    (b'{"prompt": "tea", "max_tokens": 2, "more": ' + b"[" * 500 + b"]" * 500 + b"}", JSON, 200),
    (b'{"prompt": "tea", "max_tokens": 2, "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON, 400),
    (b'{"prompt": "tea", "max_tokens": 2}', "application/json; charset=utf-8", 200),
    (b'{"prompt": "tea", "max_tokens": 2}', "text/plain", 400),
    (b'{"prompt": "tea", "max_tokens": 2}', "", 400),
]
"""Bodies of text completions as bytes, with their content type."""
TOO_LARGE = b'{"prompt": "' + b"a" * (5 << 20) + b'"}'


Post = Callable[[str, bytes, str], Any]
"""Path, body and content type to an answer with a `status_code` and `json()`."""


def check_verdict(post: Post, case: Case) -> None:
    _check(post(case.path, json.dumps(case.body).encode(), JSON), case.status, case.code)


def check_raw(post: Post, content: bytes, content_type: str, status: int) -> None:
    _check(post(TEXT, content, content_type), status, None)


def _check(answer: Any, status: int, code: str | None) -> None:
    assert answer.status_code == status, answer.text
    if status >= 400:
        error = answer.json()["error"]
        assert error.keys() >= {"message", "type", "param", "code"}
        assert error["code"] == (code or status)


def check_server(http: httpx.Client) -> None:
    """The whole table, over the network; all that is wrong is told at once."""

    def post(path: str, content: bytes, kind: str) -> httpx.Response:
        return http.post(path, content=content, headers={"content-type": kind})

    max_model_len = http.get("/v1/models").json()["data"][0]["max_model_len"]
    wrong: list[str] = []
    for case in (*TABLE, *context_cases(max_model_len)):
        try:
            check_verdict(post, case)
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    for content, kind, status in (*RAW, (TOO_LARGE, JSON, 413)):
        try:
            check_raw(post, content, kind, status)
        except AssertionError as error:
            wrong.append(f"{content[:60]!r}: {error}")
    assert not wrong, "\n".join(wrong)
