"""What a chat is exported as: the requests that were sent, runnable; all of the chat; and nothing that opens it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from chat import Chat, Context
from chat_session import ChatSession
from contender_api import Sampling
from export import as_curl, as_json, as_markdown
from kvarena.documents import TextChunk
from runs import Run
from settings import Contender
from support.small_openai_server import OFFER, SmallServer, StartServer
from verdict import verdicts

NASTY = 'Who\'s $HOME `id` "there"? \\ END_OF_BODY\nEND_OF_BODY\n# **No** <b>heading</b>\n```\n'
CONTEXT = Context("Be 'brief'.", (TextChunk("own *notes*", "Ann keeps bees.\n````\nÜ 🐝"),), " # # ")
SAMPLING = Sampling(0.5, 9, recomputing={"policy": "kv_deviation", "ratio": 0.4}, probabilities=True)


@dataclass
class Asked:
    chat: Chat
    servers: dict[str, SmallServer]


@pytest.fixture
def asked(small_server: StartServer) -> Iterator[Asked]:
    """Two questions, the second following on from the first, and a repeat, of two contenders and one that is down."""
    servers = {"blend": small_server(offer=OFFER), "plain": small_server(), "gone": small_server()}
    servers["gone"].stop()
    sessions = {
        name: ChatSession(Contender(name, f"The {name}\none", server.url, report="blend" if name == "blend" else ""))
        for name, server in servers.items()
    }
    chat = Chat()
    for _ in range(2):
        _run_out(Run(chat, CONTEXT, NASTY, sessions, SAMPLING))
    _run_out(Run(chat, CONTEXT, NASTY, sessions, SAMPLING, repeats=1))
    yield Asked(chat, servers)
    for session in sessions.values():
        session.close()


def _run_out(run: Run) -> None:
    while run.advance():
        time.sleep(0.01)


def test_the_commands_send_the_very_bodies_again(asked: Asked) -> None:
    script = as_curl(asked.chat)
    assert script.count("# nothing was sent") == 3
    before = {name: server.completions() for name, server in asked.servers.items()}
    ran = subprocess.run(["sh"], input=script, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("data: [DONE]") == 6
    for name, server in asked.servers.items():
        assert server.completions() == before[name] * 2, name
    assert len(before["blend"][1]["messages"]) == 4, "a follow-up has the contender's own answer"
    assert before["blend"][0]["stream"]


def test_the_key_of_the_shell_goes_along_and_is_not_in_the_script(asked: Asked) -> None:
    script = as_curl(asked.chat)
    environment = {**os.environ, "KVARENA_API_KEY": "a 'secret'"}
    subprocess.run(["sh"], input=script, env=environment, capture_output=True, text=True, timeout=60, check=True)
    headers = [headers for path, _, headers in asked.servers["plain"].requests if path.endswith("completions")]
    assert [one.get("authorization") for one in headers] == [None] * 3 + ["Bearer a 'secret'"] * 3


def test_the_address_is_that_for_people(asked: Asked) -> None:
    answer = asked.chat.turns[0].answers["plain"]
    answer.contender = dataclasses.replace(answer.contender, public_url="https://arena.example/plain")
    assert "curl -sSN --fail-with-body https://arena.example/plain/v1/chat/completions " in as_curl(asked.chat)


def test_json_has_all_of_the_chat(asked: Asked) -> None:
    told = json.loads(as_json(asked.chat))
    assert told["format"] == "kvarena-chat"
    assert [turn["question"] for turn in told["turns"]] == [NASTY] * 3
    assert [turn["repeats"] for turn in told["turns"]] == [None, None, 1]
    answer = told["turns"][0]["answers"]["blend"]
    assert (answer["text"], answer["state"]) == ("Hello, world", "done")
    assert answer["figures"]["first_token_ms"] > 0
    assert answer["request"]["kv_transfer_params"]["kvarena"] == SAMPLING.recomputing
    assert told["turns"][0]["context"]["chunks"] == [{"name": "own *notes*", "text": CONTEXT.chunks[0].text}]
    said = {(one["contender"], one["reference"]) for one in told["verdicts"]}
    assert said == {(verdict.title, verdict.reference) for verdict in verdicts(asked.chat.turns)} != set()


def test_markdown_shows_texts_letter_for_letter(asked: Asked) -> None:
    told = as_markdown(asked.chat)
    assert told.count(f"````text\n{NASTY}\n````") == 3
    assert told.count(f"`````text\n{CONTEXT.chunks[0].text}\n`````") == 1
    assert told.count("```text\nHello, world\n```") == 6
    assert "### own \\*notes\\*" in told
    assert "### The blend one" in told
    assert "- recomputing: policy kv_deviation, ratio 0.4" in told
    assert "- time to first token: " in told
    (verdict, *_) = verdicts(asked.chat.turns)
    assert told.index(verdict.agreement_text()) < told.index("## 1. Question"), "first what it says"
    assert "- state: failed (Nothing answers at " in told


@pytest.mark.parametrize("export", [as_json, as_markdown, as_curl])
def test_no_export_opens_the_chat(asked: Asked, export: Callable[[Chat], str]) -> None:
    assert asked.chat.key not in export(asked.chat)
    assert export(Chat())
