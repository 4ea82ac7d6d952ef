"""An AI 100 engine over the host runtime, whose device runs are counted, beside Hugging Face's own `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ai100.engine import AI100Engine, AI100Generation, AI100Options
from ai100.runtimes.host import HostRuntime
from ai100.runtimes.runtime import DecodeRow, Logits, StaticShapes
from ai100.topics import KeywordTopics, Topics
from kvarena.engines.base import GenerationRequest, Report, Sampling

CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LISTS = {"water": ["river", "rain"], "food": ["bread", "tea"], "land": ["hill", "stone"], "beasts": ["goat", "cat"]}
SHAPES = StaticShapes(prefill_seq_len=16, ctx_len=512, full_batch_size=2, kv_cache_batch_size=4)
"""Three slots for topics, and one that is set aside."""
MAX_TOKENS = 8

SEED = [
    "Tell me about Virat Kohli",
    "How many centuries has he scored?",
    "Who wrote Harry Potter?",
    "What's the last book about?",
    "What's Virat's highest score?",
]
SEED_TOPICS = ["cricket", "cricket", "books", "books", "cricket"]
"""Of a conversation with two topics."""


class CountedRuntime(HostRuntime):
    """The host runtime; `before` is called before each run of the device, and may fail in its place."""

    def __init__(self, *arguments: Any) -> None:
        self.prefills: list[tuple[int, int, int]] = []
        """Slot, position, number of tokens."""
        self.decodes: list[list[DecodeRow]] = []
        self.num_reopened = 0
        self.before: Callable[[str, Sequence[int]], None] = lambda kind, slots: None
        super().__init__(*arguments)
        self.prefills.clear()

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Logits:
        self.before("prefill", [slot])
        self.prefills.append((slot, position, len(token_ids)))
        return super().prefill(slot, token_ids, position)

    def decode(self, rows: Sequence[DecodeRow]) -> Logits:
        self.before("decode", [row.slot for row in rows])
        self.decodes.append(list(rows))
        return super().decode(rows)

    def reopen(self) -> None:
        self.before("reopen", [])
        self.num_reopened += 1
        super().reopen()

    def num_prefilled(self) -> int:
        return sum(count for _, _, count in self.prefills)


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    report: Report

    @property
    def details(self) -> dict[str, Any]:
        return {**self.report.texts, **self.report.details}


@dataclass
class AI100:
    """An engine, its runtime, and the same weights as Hugging Face serves them."""

    engine: AI100Engine
    runtime: CountedRuntime
    reference: Any
    histories: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def ask(self, question: str, conversation: str | None = "c", **how: Any) -> Answer:
        return read(self.start([{"role": "user", "content": question}], conversation, **how), self.engine)

    def chat(self, question: str, conversation: str, **how: Any) -> Answer:
        """As a client does that sends its whole history and no name."""
        history = self.histories.setdefault(conversation, [])
        history.append({"role": "user", "content": question})
        answer = read(self.start(list(history), None, **how), self.engine)
        history.append({"role": "assistant", "content": answer.text})
        return answer

    def start(
        self,
        messages: Sequence[dict[str, str]],
        conversation: str | None,
        *,
        sampling: Sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.0),  # noqa: B008 - frozen
        salt: str = "",
        **options: Any,
    ) -> AI100Generation:
        request = GenerationRequest(
            "test",
            "",
            sampling,
            add_special_tokens=False,
            messages=tuple(messages),
            cache_salt=salt,
            conversation_id=conversation,
            options=AI100Options(**options),
        )
        return self.engine.generate(request)

    def generate(self, prompt: Sequence[int], max_tokens: int = MAX_TOKENS) -> list[int]:
        """Hugging Face's answer, without the end-of-sequence token."""
        ids = torch.tensor([list(prompt)])
        output = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer[:-1] if answer and answer[-1] in self.runtime.eos_token_ids else answer


def read(generation: AI100Generation, engine: AI100Engine) -> Answer:
    """To the end, as the server does; the end-of-sequence token is left out."""
    from kvarena.server.text import Detokenizer

    tokens = [token.token_id for token in generation if not token.is_end]
    text = Detokenizer(engine.tokenizer, generation.prompt_token_ids)
    return Answer(
        list(generation.prompt_token_ids),
        tokens,
        "".join(map(text.push, tokens)),
        generation.finish_reason,
        generation.report,
    )


def make_ai100(
    folder: Path, shapes: StaticShapes = SHAPES, topics: Topics | None = None, *, reference: Any = None, **settings: Any
) -> AI100:
    runtime = CountedRuntime.load(str(folder), shapes, "cpu")
    assert isinstance(runtime, CountedRuntime)
    if runtime.tokenizer.chat_template.startswith("{% for m in messages %}{{ m.content }}"):
        runtime.tokenizer.chat_template = CHAT_TEMPLATE
    settings = {"max_context": shapes.ctx_len, "gen_len": MAX_TOKENS} | settings
    engine = AI100Engine(runtime, folder.name, topics or KeywordTopics(LISTS), **settings)
    return AI100(engine, runtime, reference)


def at_once(asks: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """Each in a thread of its own."""
    answers: dict[int, Answer] = {}
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            answers[number] = asks[number]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failures:
        raise failures[0]
    return [answers[number] for number in range(len(asks))]
