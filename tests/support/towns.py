"""Towns for the tests."""

from __future__ import annotations

import random

from kvarena.synthetic_qa.facts import Chunk
from kvarena.synthetic_qa.town import LINKS, TownShape, write_town


def small_town(seed: int, num_chunks: int = 8, chunk_tokens: int = 70) -> list[Chunk]:
    return write_town(random.Random(seed), TownShape(num_chunks, chunk_tokens, links=LINKS))
