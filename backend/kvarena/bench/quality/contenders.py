"""Which contenders are asked: servers by address, services of the running stack by name, or engines in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvarena.bench.quality.answers import Answerer
from kvarena.bench.quality.in_process import CONTENDERS, BlendAnswerer, PlainAnswerer
from kvarena.bench.quality.over_http import HTTPAnswerer
from kvarena.engines.hf_model import HFModel
from kvarena.stack.home import Home
from kvarena.stack.model import find_model
from kvarena.stack.record import read_record
from kvarena.stack.settings import CONTENDERS as STACK_CONTENDERS
from kvarena.stack.settings import shown_api_key
from kvarena.vllm_plugin.config import BlendConfig, read_blend_profile


def servers(wanted: Sequence[str], timeout_s: float, has_logprobs: bool) -> dict[str, Answerer]:
    """`wanted` are names of the running stack, or `name=address`; all of the stack's when empty.

    Raises `ValueError` for a name that doesn't run and for an address at which nothing answers.
    """
    record = read_record(Home.find())
    running = {
        service.name: service.address
        for service in (record.services if record else ())
        if service.name in STACK_CONTENDERS
    }
    if not wanted and not running:
        raise ValueError(
            "nothing runs; start the stack with ./run-server.sh, or name servers: --contender name=address"
        )
    addresses = dict(_address(given, running) for given in wanted) if wanted else running
    key = shown_api_key()
    return {name: HTTPAnswerer(name, url, key, timeout_s, has_logprobs) for name, url in addresses.items()}


def default_data_dir(engine: str, model: str | None) -> Path:
    """The documents to ask about where nobody names any: the running stack's, or those that go with the model."""
    record = read_record(Home.find()) if engine == "http" else None
    return Path(record.data_dir) if record else find_model(model, "cpu").data_dir


def engines(wanted: Sequence[str], model: str | None, separator: str | None, store_gb: float) -> dict[str, Answerer]:
    """`plain`, `blend` or both on a model in this process; they share its weights. Raises `ValueError`, `OSError`."""
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise ValueError(f"in this process there are {', '.join(CONTENDERS)}, not {unknown[0]!r}")
    found = find_model(model, "cpu")
    profile = read_blend_profile(found.name)
    config = BlendConfig(**(profile | ({"separator": separator} if separator is not None else {})))
    shared = HFModel.load(found.name), found, config.separator
    store_bytes = int(store_gb * 2**30)
    return {
        name: BlendAnswerer(name, *shared, config.params, store_bytes)
        if name == "blend"
        else PlainAnswerer(name, *shared)
        for name in wanted or CONTENDERS
    }


def _address(given: str, running: dict[str, str]) -> tuple[str, str]:
    name, _, url = given.partition("=")
    if url:
        return name, url if "://" in url else f"http://{url}"
    if name not in running:
        raise ValueError(
            f"{name} isn't running; running: {', '.join(running) or 'nothing'}. "
            "Start it with ./run-server.sh --contenders, or give its address: --contender name=address"
        )
    return name, running[name]
