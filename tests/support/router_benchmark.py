"""What a router costs and decides: `python tests/support/router_benchmark.py MODEL`, a folder with an instruct model.

Times to first token, in ms, of prompts over six of the shipped documents: chunks that nobody knows, that the asked
server or the other one has computed, a beginning in vLLM's prefix cache, each asked through the router and directly.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from kvarena.client import Client  # noqa: E402
from kvarena.documents import build_messages, load_chunks  # noqa: E402
from support.fleet import Fleet, open_fleet  # noqa: E402

SEPARATOR = "\n\n* * *\n\n"
NUM_CHUNKS = 6
NUM_ROUNDS = 7


def main(model: str) -> None:
    texts = [chunk.text for chunk in load_chunks(ROOT / "data")]
    rng = random.Random(0)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, open_fleet(model, Path(folder), SEPARATOR) as fleet:
        one, other = (server.url for server in fleet.servers)
        for number in range(NUM_ROUNDS + 1):
            for name, ask in cases(fleet, rng.sample(texts, NUM_CHUNKS), f"{number}", one, other, rng).items():
                passed_ms = ask()
                if number:  # the first round warms up
                    times.setdefault(name, []).append(passed_ms)
    for name, passed in times.items():
        print(f"{name:50} {median(passed):8.1f} ms ({min(passed):.1f} to {max(passed):.1f})")


def cases(
    fleet: Fleet, texts: list[str], number: str, one: str, other: str, rng: random.Random
) -> dict[str, Callable[[], float]]:
    """In this order. Texts begin with the round's number, so that nobody knows them."""
    own = [f"{number}. {text}" for text in texts]
    router = str(fleet.by_session.base_url)

    def first_token_ms(url: str, chunks: list[str], question: str) -> float:
        messages = build_messages("", chunks, question, SEPARATOR)
        body = {"model": "tiny", "messages": messages, "max_tokens": 2, "temperature": 0}
        with Client(url) as client:
            return client.stream("/v1/chat/completions", body).ttft_ms or float("nan")

    def shuffled() -> list[str]:
        return rng.sample(own, len(own))

    return {
        "chunks that nobody knows": lambda: first_token_ms(one, own, "What is it about?"),
        "chunks of the same server, in a new order": lambda: first_token_ms(one, shuffled(), "Who is it about?"),
        "chunks of the other server, in a new order": lambda: first_token_ms(other, shuffled(), "Who is it about?"),
        "the same through the router": lambda: first_token_ms(router, shuffled(), "When was it?"),
        "the same beginning, directly": lambda: first_token_ms(one, own, "And where was it?"),
    }


if __name__ == "__main__":
    main(sys.argv[1])
