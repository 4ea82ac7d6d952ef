"""`uvicorn --app-dir examples api.server:app`: the contender `prefix`, under the name of the original's server.

MODEL is a folder, a name on the Hugging Face hub, or town; without it, the stack's default. PREFIX_MIN_TOKENS is the
least number of tokens that are reused (20); PREFIX_MAX_ENTRIES and PREFIX_MAX_AGE_S bound the number of prefixes and
their age.
"""

import os

from kvarena.contenders.prefix.cache import CAPACITY_BYTES, MIN_TOKENS
from kvarena.contenders.prefix.engine import PrefixEngine
from kvarena.contenders.prefix.http import router
from kvarena.engines.hf.model import HFModel
from kvarena.engines.store_metrics import StoreCollector
from kvarena.model import find_model
from kvarena.server.app import create_app
from kvarena.server.state import ApiConfig

found = find_model(os.environ.get("MODEL"), "cpu")
engine = PrefixEngine(
    HFModel.load(found.name),
    found.served_name,
    cache_bytes=CAPACITY_BYTES,
    min_tokens=int(os.environ.get("PREFIX_MIN_TOKENS", MIN_TOKENS)),
    max_entries=int(os.environ.get("PREFIX_MAX_ENTRIES", 0)) or None,
    max_age_s=float(os.environ.get("PREFIX_MAX_AGE_S", 0)) or None,
)
app = create_app(engine, ApiConfig.from_environment(), routers=[router], collectors=[StoreCollector(engine)])
