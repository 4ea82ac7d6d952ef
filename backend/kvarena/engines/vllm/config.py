"""Settings of the blend inside vLLM, and what a single request may ask of it. Imports neither torch nor vllm.

`BlendConfig` is one frozen dataclass with every setting. It travels to the scheduler's and the workers' processes as
the `kv_connector_extra_config` of `--kv-transfer-config`; `BlendConfig.from_extra_config` is where it is read and
checked there. A request asks by the `kvarena` object in its `kv_transfer_params` (`read_request_params`); what it
may change is `kvarena.policies.params.BlendParams`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvarena.core.matching import DEFAULT_SINK_TOKENS, MAX_SINK_TOKENS
from kvarena.policies.params import PARAMETERS, BlendParams, check_max_ttft_ms
from kvarena.policies.registry import REQUEST_KEYS

CONNECTOR = "KVArenaConnector"
CONTENDER_VARIABLE = "KVARENA_CONTENDER"
"""Names a vLLM server in its log."""
STORES = ("lmcache", "memory")
Unsupported = Literal["refuse", "plain"]


@dataclass(frozen=True)
class BlendConfig(BlendParams):
    """Every setting of the blend.

    The fields of `BlendParams` and `max_ttft_ms` are the defaults of what a request may choose. `max_ttft_ms`, where it
    is set, chooses the ratio; `ratio` is then what the first blends begin with. `separator` marks chunk boundaries in a
    prompt's text (empty: none). `sink_tokens`: chunks are computed after so many of the tokens that all chat prompts
    begin with; 0 computes them alone. `seams`: chunks are reused as computed after the chunk before them, where the
    store has that. `index_path`: the file in which the known chunks' token ids survive a restart; empty: they don't.
    `unsupported`: a model that can't be blended stops the server ("refuse"), or is served without blending ("plain").
    `step_tokens`: about how many tokens blends run through the model in one step of the engine; 0: as many as vLLM
    itself does (`--max-num-batched-tokens`). Sizes are in bytes, times in seconds.
    """

    max_ttft_ms: float | None = None
    separator: str = " # # "
    min_chunk_tokens: int = 16
    sink_tokens: int = DEFAULT_SINK_TOKENS
    seams: bool = False
    store: str = "lmcache"
    store_bytes: int = 2 << 30
    lmcache_url: str = "tcp://127.0.0.1:5555"
    lmcache_http_url: str = "http://127.0.0.1:8080"
    lmcache_timeout_s: float = 1.0
    index_path: str = ""
    unsupported: str = "refuse"
    step_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_ttft_ms is not None:
            check_max_ttft_ms(self.max_ttft_ms, self.params)
        if self.store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, not {self.store!r}")
        if self.unsupported not in get_args(Unsupported):
            raise ValueError(f"unsupported must be one of {', '.join(get_args(Unsupported))}, not {self.unsupported!r}")
        if not self.separator.isascii():
            raise ValueError(f"separator must be ASCII, not {self.separator!r}")
        if self.min_chunk_tokens < 1:
            raise ValueError(f"min_chunk_tokens must be at least 1, not {self.min_chunk_tokens}")
        if not 0 <= self.sink_tokens <= MAX_SINK_TOKENS:
            raise ValueError(f"sink_tokens must be from 0 to {MAX_SINK_TOKENS}, not {self.sink_tokens}")
        if not isinstance(self.seams, bool):
            raise ValueError(f"seams must be true or false, not {self.seams!r}")
        if self.step_tokens < 0:
            raise ValueError(f"step_tokens must not be negative, not {self.step_tokens}")
        if self.lmcache_timeout_s <= 0:
            raise ValueError(f"lmcache_timeout_s must be positive, not {self.lmcache_timeout_s}")
        if self.store_bytes < 0:
            raise ValueError(f"store_bytes must not be negative, not {self.store_bytes}")

    @property
    def params(self) -> BlendParams:
        return BlendParams(**{name: getattr(self, name) for name in PARAMETERS})

    def to_extra_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_extra_config(cls, extra: dict[str, Any]) -> BlendConfig:
        """Raises `ValueError` naming the key for one that isn't a setting."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(extra) - known):
            raise ValueError(f"unknown blend setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**extra)


def kv_transfer_config(config: BlendConfig) -> str:
    """The value of vLLM's `--kv-transfer-config` that loads the blend with these settings."""
    return json.dumps(
        {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": "kvarena.engines.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": config.to_extra_config(),
        }
    )


KEY = "kvarena"
NamedChunk = str | list[int]
MAX_NAMED_CHUNKS = 4096
AUTO_RATIO = "auto"
STORE_ALL = "all"
STORE_SCORES = "scores"
"""As `STORE_ALL`, and the prompt is computed whole for its chunks' scores (`kvarena.core.attention`)."""
STORE_SEAMS = "seams"
"""As `STORE_ALL`, and each chunk is also computed after the one before it (`Planner.seams`)."""


@dataclass(frozen=True)
class RequestParams:
    """`max_ttft_ms`, where there is one: the time to first token that decides on the ratio. `store_new`: whether chunks
    that this request brings are kept. `store_all`: every marked chunk is looked up, and kept if it isn't there; neither
    vLLM's prefix cache nor a similar known chunk takes its place. `store_scores`, `store_seams`: see `STORE_SCORES`
    and `STORE_SEAMS`. `chunks`: texts, or their token ids, that are to be reused as wholes. `token_scores`: the report
    tells why each recomputed token was chosen.
    """

    blend: BlendParams
    max_ttft_ms: float | None = None
    store_new: bool = True
    store_all: bool = False
    store_scores: bool = False
    store_seams: bool = False
    chunks: tuple[NamedChunk, ...] = ()
    token_scores: bool = False

    @property
    def recomputes_all(self) -> bool:
        return self.store_scores or (self.blend.recomputes_all and self.max_ttft_ms is None)

    @property
    def recomputes_none(self) -> bool:
        return self.blend.recomputes_none and self.max_ttft_ms is None and not self.store_scores


def read_request_params(
    kv_transfer_params: object, defaults: BlendParams, max_ttft_ms: float | None = None
) -> RequestParams:
    """The request's own before the server's. A ratio of the request goes before the server's `max_ttft_ms`.

    Raises `ValueError` naming the key or value and the choices. Keys of other connectors are left alone.
    """
    given = given_params(kv_transfer_params)
    takes = [*PARAMETERS, *REQUEST_KEYS]
    if unknown := sorted(set(given) - set(takes)):
        raise ValueError(f"kv_transfer_params.{KEY} has no {unknown[0]!r}; it takes {', '.join(takes)}")
    chosen = {name: given[name] for name in PARAMETERS if name in given}
    if chosen.get("ratio") == AUTO_RATIO:
        del chosen["ratio"]
    blend = dataclasses.replace(defaults, **chosen)
    store = _read_store(given)
    timed = _read_max_ttft_ms(given, blend, max_ttft_ms)
    return RequestParams(
        blend,
        timed,
        store_new=store is not False,
        store_all=isinstance(store, str),
        store_scores=store == STORE_SCORES,
        store_seams=store == STORE_SEAMS,
        chunks=read_chunks(given),
        token_scores=_read_token_scores(given),
    )


def given_params(kv_transfer_params: object) -> Mapping[str, Any]:
    """The request's own `kvarena` object, empty where it has none. Raises `ValueError` for one that isn't an object."""
    given = kv_transfer_params.get(KEY) if isinstance(kv_transfer_params, Mapping) else None
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"kv_transfer_params.{KEY} must be an object, not {given!r}")
    return given or {}


def _read_max_ttft_ms(given: Mapping[str, Any], blend: BlendParams, default: float | None) -> float | None:
    if given.get("ratio", AUTO_RATIO) != AUTO_RATIO:
        if "max_ttft_ms" in given:
            raise ValueError(f"give a ratio or max_ttft_ms, which chooses it, not both; ratio is {given['ratio']!r}")
        return None
    if "max_ttft_ms" in given:
        return check_max_ttft_ms(given["max_ttft_ms"], blend)
    if "ratio" not in given:
        return default if blend.goes_by_ratio else None
    if default is None:
        raise ValueError(f'ratio "{AUTO_RATIO}" needs max_ttft_ms, the time to first token to keep to')
    return check_max_ttft_ms(default, blend)


def _read_token_scores(given: Mapping[str, Any]) -> bool:
    wanted: object = given.get("token_scores", False)
    if not isinstance(wanted, bool):
        raise ValueError(f"token_scores must be true or false, not {wanted!r}")
    return wanted


def _read_store(given: Mapping[str, Any]) -> bool | str:
    store: object = given.get("store", True)
    if store in (True, False, STORE_ALL, STORE_SCORES, STORE_SEAMS) and isinstance(store, bool | str):
        return store
    raise ValueError(f'store must be true, false, "{STORE_ALL}", "{STORE_SCORES}" or "{STORE_SEAMS}", not {store!r}')


def read_chunks(given: Mapping[str, Any]) -> tuple[NamedChunk, ...]:
    """Raises `ValueError` for what isn't a list of texts or of token ids, or too long a one."""
    chunks = given.get("chunks", [])
    if not isinstance(chunks, list) or not all(isinstance(chunk, str) or _is_token_ids(chunk) for chunk in chunks):
        raise ValueError("chunks must be a list of strings, or of lists of token ids")
    if len(chunks) > MAX_NAMED_CHUNKS:
        raise ValueError(f"chunks must be at most {MAX_NAMED_CHUNKS}, not {len(chunks)}")
    return tuple(chunks)


def _is_token_ids(chunk: object) -> bool:
    if not isinstance(chunk, list) or not set(map(type, chunk)) <= {int}:
        return False
    return 0 <= min(chunk, default=0) <= max(chunk, default=0) < 2**31
