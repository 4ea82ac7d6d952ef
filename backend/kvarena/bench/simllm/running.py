"""A stream put to all contenders in turn, request by request, so that a slower minute of the machine meets all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarena.bench.simllm.contenders import Contender, Network, Setup, TaskAnswer
from kvarena.bench.simllm.stream import StreamTask

WARM_UP = "Say something, so that all memory is there."


@dataclass(frozen=True)
class Asking:
    """How a stream is put. All answers take `max_new_tokens` steps, so that answers of all lengths cost the same."""

    system: str
    separator: str
    max_new_tokens: int = 8
    max_cache_size: int = 100


@dataclass(frozen=True)
class ContenderRun:
    """`answers` are in the stream's order; `task_bytes` is the KV kept of tasks behind the last one."""

    setup: Setup
    answers: Sequence[TaskAnswer]
    task_bytes: int


def run_stream(
    network: Network,
    tasks: Sequence[StreamTask],
    setups: Sequence[Setup],
    asking: Asking,
    on_step: Callable[[], None] = lambda: None,
) -> list[ContenderRun]:
    """A run for each setup. Raises `ValueError` for a prompt that has no room in the model's context."""
    contenders = [network.contender(setup, asking.max_cache_size) for setup in setups]
    answers: list[list[TaskAnswer]] = [[] for _ in contenders]
    try:
        for contender in contenders:
            warm_up(contender, network, asking)
        for number, task in enumerate(tasks):
            prompt = network.token_ids(task.question.messages(asking.system, asking.separator))
            for place in _in_turn(len(contenders), number):
                answers[place].append(contenders[place].answer(prompt, asking.max_new_tokens))
                on_step()
        return [
            ContenderRun(contender.setup, given, contender.task_bytes)
            for contender, given in zip(contenders, answers, strict=True)
        ]
    finally:
        for contender in contenders:
            contender.engine.close()


def warm_up(contender: Contender, network: Network, asking: Asking) -> None:
    """One answer that nothing remembers."""
    contender.answer(network.token_ids([{"role": "user", "content": WARM_UP}]), asking.max_new_tokens)
    contender.engine.simllm.reset_cache()


def _in_turn(count: int, number: int) -> list[int]:
    """Places 0 to count - 1, another one first each time."""
    return [(place + number) % count for place in range(count)]
