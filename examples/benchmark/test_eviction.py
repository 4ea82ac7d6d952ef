"""What ends a prefix: more prefixes than may be kept, and age. MODEL is a folder or a hub name; without it, town.

The model is real, and so are the prefixes; each is 40 tokens of its own.
"""

import os
import time

from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.engines.base import GenerationRequest, Sampling
from kvarena.engines.hf.model import HFModel
from kvarena.model import find_model

MAX_ENTRIES, MAX_AGE_S = 3, 2.0

found = find_model(os.environ.get("MODEL", "town"), "cpu")
model = HFModel.load(found.name)
sampling = Sampling(max_tokens=1, temperature=0)


def reused(engine: PrefixEngine, number: int) -> int:
    """Asks a prompt, and returns how many of its tokens were known."""
    generation = engine.generate(GenerationRequest(f"request-{number}", [number + 10] * 40, sampling))
    list(generation)
    print(f"prompt {number}: {generation.report.num_reused_tokens} of 40 tokens reused   {engine.cache.get_stats()}")
    return generation.report.num_reused_tokens


print(f"At most {MAX_ENTRIES} prefixes:")
engine = PrefixEngine(model, found.served_name, cache_bytes=2**30, max_entries=MAX_ENTRIES)
for number in (0, 1, 2, 0, 3):
    reused(engine, number)
assert reused(engine, 0) == 40, "it was used since"
assert reused(engine, 1) == 0, "the least recently used one went"

print(f"At most {MAX_AGE_S:.0f} seconds:")
engine = PrefixEngine(model, found.served_name, cache_bytes=2**30, max_age_s=MAX_AGE_S)
reused(engine, 0)
assert reused(engine, 0) == 40
time.sleep(MAX_AGE_S + 0.1)
assert reused(engine, 0) == 0, "it was too old"
assert engine.cache.get_stats()["evictions_ttl"] == 1
model.close()
