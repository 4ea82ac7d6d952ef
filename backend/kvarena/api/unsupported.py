"""Parameters that clients of OpenAI and vLLM know and this server can't honour.

Each is refused unless it has a value that asks for nothing. Ignoring it would be a wrong answer that looks right; what
is neither here nor in the request's model is ignored, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT: tuple[Any, ...] = (None, [], {}, False, "")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": _ABSENT,
    "audio": _ABSENT,
    "bad_words": _ABSENT,
    "best_of": (None, 1),
    "chat_template": _ABSENT,
    "echo": _ABSENT,
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": _ABSENT,
    "guided_choice": _ABSENT,
    "guided_grammar": _ABSENT,
    "guided_json": _ABSENT,
    "guided_regex": _ABSENT,
    "length_penalty": (None, 1),
    "logit_bias": _ABSENT,
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, [], ["text"]),
    "prediction": _ABSENT,
    "presence_penalty": (None, 0),
    "prompt_embeds": _ABSENT,
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "stop_token_ids": _ABSENT,
    "structured_outputs": _ABSENT,
    "suffix": _ABSENT,
    "tool_choice": (None, "none", "auto"),
    "tools": _ABSENT,
    "top_k": (None, 0, -1),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": _ABSENT,
    "web_search_options": (None,),
}


def unsupported_parameter(body: Mapping[str, Any]) -> str | None:
    """What to say about the first parameter that can't be honoured; `None` where all can."""
    for name, neutral in _NEUTRAL.items():
        if name in body and body[name] not in neutral:
            accepted = [value for value in neutral if value is not None and value not in _ABSENT[1:]]
            allowed = f"; accepted is {' or '.join(map(repr, accepted))}" if accepted else ""
            return f"{name} is not supported by this server{allowed}"
    return None
