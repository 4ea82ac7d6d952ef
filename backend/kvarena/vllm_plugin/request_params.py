"""What a request may ask of the blend: the `kvarena` object in its `kv_transfer_params`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvarena.reuse.params import BlendParams

KEY = "kvarena"


@dataclass(frozen=True)
class RequestParams:
    """`store_new`: whether chunks that this request brings are kept. `chunks`: texts to be reused as wholes."""

    blend: BlendParams
    store_new: bool = True
    chunks: tuple[str, ...] = ()


def read_request_params(kv_transfer_params: object, defaults: BlendParams) -> RequestParams:
    """Raises `ValueError` naming the key or value and the choices. Keys of other connectors are left alone."""
    given = given_params(kv_transfer_params)
    choices = [field.name for field in dataclasses.fields(BlendParams)]
    if unknown := sorted(set(given) - {*choices, "store", "chunks"}):
        raise ValueError(
            f"kv_transfer_params.{KEY} has no {unknown[0]!r}; it takes {', '.join([*choices, 'store', 'chunks'])}"
        )
    blend = dataclasses.replace(defaults, **{name: given[name] for name in choices if name in given})
    return RequestParams(blend, _read_store(given), _read_chunks(given))


def given_params(kv_transfer_params: object) -> Mapping[str, Any]:
    """The request's own `kvarena` object, empty where it has none. Raises `ValueError` for one that isn't an object."""
    given = kv_transfer_params.get(KEY) if isinstance(kv_transfer_params, Mapping) else None
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"kv_transfer_params.{KEY} must be an object, not {given!r}")
    return given or {}


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
