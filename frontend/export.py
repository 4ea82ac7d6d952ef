"""A chat as JSON, as Markdown, and as curl commands that repeat its requests; and the controls that offer these.

None of them contains the chat's key, which would open it, or an API key.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import streamlit as st

from chat import Answer, Chat, Turn
from chat_file import chat_form
from kvarena.client import API_KEY_VARIABLE, CHAT, streamed
from verdict import Verdict, verdicts
from votes import ballots_of, standings
from waterfall import shown_ms

FORMAT = "kvarena-chat"
_KEPT_BACK = {"key", "draft", "conversations", "_seen", "_num_noted"}
_END = "END_OF_BODY"


def as_json(chat: Chat) -> str:
    """Everything except the messages, which follow from contexts, questions and answers; with verdicts and votes."""
    told = chat_form(type(chat)).dump_python(chat, mode="json", exclude=_KEPT_BACK)
    votes = [asdict(one) for group in standings(ballots_of(chat)) for one in group]
    said = [_verdict_json(verdict) for verdict in verdicts(chat.turns)]
    return json.dumps({"format": FORMAT, "version": 1, **told, "verdicts": said, "votes": votes}, indent=1)


def as_markdown(chat: Chat) -> str:
    """To read: the verdicts; questions, settings and answers with their figures; votes; and the texts at the end."""
    said = [f"- {_line(' · '.join(_verdict_parts(verdict)))}" for verdict in verdicts(chat.turns)]
    turns = [part for index in range(len(chat.turns)) for part in _turn_parts(chat, index)]
    texts = {(chunk.name, chunk.text): None for turn in chat.turns for chunk in turn.context.chunks}
    told = [part for name, text in texts for part in (f"### {_line(name)}", _fenced(text))]
    votes = [
        f"- {_line(one.setting)}: preferred {one.share:.0%} ({one.low:.0%} to {one.high:.0%}), {one.num_best} of "
        f"{one.num_votes} votes, {one.num_ties} ties, {one.num_bad} all bad"
        for group in standings(ballots_of(chat))
        for one in group
    ]
    parts = ["\n".join(said)] if said else []
    parts += [*turns, *(["## Votes", "\n".join(votes)] if votes else []), *(["## Texts", *told] if told else [])]
    return "\n\n".join(["# KV Arena: a chat", *parts]) + "\n"


def as_curl(chat: Chat) -> str:
    """A shell script that sends every request again, in order."""
    commands = [
        f"# {index + 1}. {_line(answer.contender.title)}\n{curl_command(chat, index, name) or '# nothing was sent'}\n"
        for index, turn in enumerate(chat.turns)
        for name, answer in turn.answers.items()
    ]
    return "\n".join(["#!/bin/sh", f"# The API key, if there is one, is taken from {API_KEY_VARIABLE}.", "", *commands])


def curl_command(chat: Chat, index: int, name: str) -> str:
    """Sends exactly a turn's body to this contender; empty if nothing was sent."""
    answer = chat.turns[index].answers[name]
    if not answer.request:
        return ""
    return "\n".join(
        [
            f"curl -sSN --fail-with-body {shlex.quote(answer.contender.address + CHAT)} \\",
            "  -H 'Content-Type: application/json' \\",
            f'  ${{{API_KEY_VARIABLE}:+-H "Authorization: Bearer ${API_KEY_VARIABLE}"}} \\',
            f"  --data-binary @- <<'{_END}'",
            json.dumps(streamed({**answer.request, "messages": chat.asked(index, name)})),
            _END,
        ]
    )


def draw_export(chat: Chat, page: str = "chat") -> None:
    """The chat's link and its files, to copy and save."""
    with st.popover("Share", key="share", icon=":material/share:"):
        st.caption("Anyone with this link can read the chat and go on with it.")
        st.code(f"{st.context.url or ''}?{page}={chat.key}", language=None, wrap_lines=True)
        forms: dict[str, tuple[str, Callable[[Chat], str]]] = {
            "JSON": ("json", as_json),
            "Markdown": ("md", as_markdown),
            "curl commands": ("sh", as_curl),
        }
        with st.container(horizontal=True):
            for label, (suffix, form) in forms.items():
                file_name, data = f"kvarena-chat.{suffix}", partial(form, chat)
                st.download_button(label, data, file_name, key=f"export-{suffix}", on_click="ignore")


def draw_copies(chat: Chat, index: int) -> None:
    """A turn's answers and requests, each with a copy button."""
    for name, answer in chat.turns[index].answers.items():
        st.caption(f"{answer.contender.title}: the answer, and the request")
        st.code(answer.text.strip(), language=None, wrap_lines=True)
        st.code(curl_command(chat, index, name) or "# nothing was sent", language="sh")


def _verdict_parts(verdict: Verdict) -> list[str]:
    return [verdict.speed_text(), verdict.agreement_text(), *verdict.notes()]


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    """`speedup` is the median over the timed prompts; `agrees` has an entry for each compared answer."""
    return {
        "contender": verdict.title,
        "reference": verdict.reference,
        "speedup": verdict.speedup,
        "num_timed": len(verdict.timed),
        "agrees": verdict.compared,
        "text": _verdict_parts(verdict),
    }


def _turn_parts(chat: Chat, index: int) -> Iterator[str]:
    turn = chat.turns[index]
    asked = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(turn.asked_s))
    again = "" if turn.repeats is None else f" ({chat.again_text(index).lower()})"
    yield f"## {index + 1}. Question{again}"
    yield _fenced(turn.question)
    yield "\n".join(f"- {label}: {value}" for label, value in _settings(turn, asked).items() if value)
    for answer in turn.answers.values():
        yield f"### {_line(answer.contender.title)}"
        yield _fenced(answer.text.strip())
        yield "\n".join(f"- {label}: {value}" for label, value in _figures(answer).items() if value is not None)


def _settings(turn: Turn, asked: str) -> dict[str, str]:
    sampling = turn.sampling
    return {
        "asked": asked,
        "chunks": _line(", ".join(chunk.name for chunk in turn.context.chunks)),
        "system prompt": json.dumps(turn.context.system, ensure_ascii=False) if turn.context.system else "",
        "separator": json.dumps(turn.context.separator, ensure_ascii=False) if turn.context.separator else "",
        "sampling": f"temperature {sampling.temperature:g}, at most {sampling.max_tokens} tokens",
        "recomputing": ", ".join(f"{key} {value}" for key, value in sampling.recomputing.items()),
        "vote": "" if turn.vote is None else " ".join(filter(None, (turn.vote.kind, turn.vote.best))),
    }


def _figures(answer: Answer) -> dict[str, str | None]:
    figures = answer.figures
    kind = {True: "approximate", False: "exact", None: None}[figures.approximate]
    first_ms, counts = figures.first_token_ms, (figures.num_reused_tokens, figures.num_recomputed_tokens)
    return {
        "state": answer.state + (f" ({_line(answer.error)})" if answer.error else ""),
        "answer": kind if kind is None or not figures.policy else f"{kind}, {figures.policy}",
        "time to first token": None if first_ms is None else shown_ms(first_ms),
        "total time": None if figures.total_ms is None else f"{figures.total_ms:,.0f} ms",
        "prompt tokens": None if figures.num_prompt_tokens is None else f"{figures.num_prompt_tokens:,}",
        "reused, recomputed": None if None in counts else ", ".join(f"{count:,}" for count in counts),
        "output tokens": None if figures.num_output_tokens is None else f"{figures.num_output_tokens:,}",
    }


def _line(text: str) -> str:
    """For a heading or a comment: on one line, with Markdown's characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Exactly as it is, in a fence that doesn't occur in it."""
    fence = next(ticks for number in itertools.count(3) if (ticks := "`" * number) not in text)
    return f"{fence}text\n{text}\n{fence}"
