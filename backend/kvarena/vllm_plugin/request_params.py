"""What a request may ask of the blend: the `kvarena` object in its `kv_transfer_params`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvarena.reuse.params import BlendParams, check_max_ttft_ms

KEY = "kvarena"
AUTO_RATIO = "auto"


@dataclass(frozen=True)
class RequestParams:
    """`max_ttft_ms`, where there is one: the time to first token that decides on the ratio. `store_new`: whether chunks
    that this request brings are kept. `chunks`: texts to be reused as wholes.
    """

    blend: BlendParams
    max_ttft_ms: float | None = None
    store_new: bool = True
    chunks: tuple[str, ...] = ()

    @property
    def recomputes_all(self) -> bool:
        return self.blend.recomputes_all and self.max_ttft_ms is None


def read_request_params(
    kv_transfer_params: object, defaults: BlendParams, max_ttft_ms: float | None = None
) -> RequestParams:
    """The request's own over the server's. A ratio of the request goes before the server's `max_ttft_ms`.

    Raises `ValueError` naming the key or value and the choices. Keys of other connectors are left alone.
    """
    given = given_params(kv_transfer_params)
    choices = [field.name for field in dataclasses.fields(BlendParams)]
    takes = [*choices, "max_ttft_ms", "store", "chunks"]
    if unknown := sorted(set(given) - set(takes)):
        raise ValueError(f"kv_transfer_params.{KEY} has no {unknown[0]!r}; it takes {', '.join(takes)}")
    chosen = {name: given[name] for name in choices if name in given}
    if chosen.get("ratio") == AUTO_RATIO:
        del chosen["ratio"]
    blend = dataclasses.replace(defaults, **chosen)
    return RequestParams(blend, _read_max_ttft_ms(given, blend, max_ttft_ms), _read_store(given), _read_chunks(given))


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


def _read_store(given: Mapping[str, Any]) -> bool:
    store = given.get("store", True)
    if not isinstance(store, bool):
        raise ValueError(f"store must be true or false, not {store!r}")
    return store


def _read_chunks(given: Mapping[str, Any]) -> tuple[str, ...]:
    chunks = given.get("chunks", [])
    if not isinstance(chunks, list) or not all(isinstance(text, str) for text in chunks):
        raise ValueError(f"chunks must be a list of strings, not {chunks!r}")
    return tuple(chunks)
