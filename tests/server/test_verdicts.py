"""The project's servers say to every body what vLLM says to it: by a table, and by mutations of good bodies.

vLLM's verdicts come from its own HTTP front in this process, ours from the three servers over tiny real models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ai100.runtimes.runtime import StaticShapes
from kvarena.contenders.simllm.engine import SimLLMEngine
from kvarena.contenders.simllm.inference import load_simllm
from kvarena.contenders.simllm.params import SimLLMParams
from kvarena.engines.base import Engine
from kvarena.server.app import create_app
from support.ai100_engine import make_ai100
from support.prefix_engine import make_prefix
from support.tiny_models import save_tiny_model
from support.verdicts import (
    BEYOND,
    CHAT,
    GOOD,
    JSON,
    RAW,
    TABLE,
    TEXT,
    TOO_LARGE,
    Case,
    Post,
    check_raw,
    check_verdict,
    context_cases,
)

pytest.importorskip("vllm")
MAX_MODEL_LEN = 256


def _simllm(folder: Path) -> Engine:
    return SimLLMEngine(load_simllm(str(folder), SimLLMParams(), device="cpu", max_model_len=MAX_MODEL_LEN), "llama")


OURS: dict[str, Callable[[Path], Engine]] = {
    "prefix": lambda folder: make_prefix(folder, max_model_len=MAX_MODEL_LEN).engine,
    "simllm": _simllm,
    "ai100": lambda folder: make_ai100(folder, StaticShapes(16, MAX_MODEL_LEN, 2, 3)).engine,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("verdicts") / "llama")


@pytest.fixture(scope="module")
def vllm(model: Path) -> Iterator[Post]:
    from support.vllm_front import vllm_front

    with TestClient(vllm_front(model, "llama", MAX_MODEL_LEN), raise_server_exceptions=False) as client:
        yield _post(client)


@pytest.fixture(scope="module", params=OURS)
def ours(request: pytest.FixtureRequest, model: Path) -> Iterator[Post]:
    engine = OURS[request.param](model)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield _post(client)
    engine.close()


def _post(client: TestClient) -> Post:
    return lambda path, content, kind: client.post(path, content=content, headers={"content-type": kind})


@pytest.mark.parametrize("case", [*TABLE, *context_cases(MAX_MODEL_LEN)], ids=str)
def test_the_table_is_vllms(vllm: Post, case: Case) -> None:
    check_verdict(vllm, case)


def test_vllm_does_what_is_beyond_our_engines(vllm: Post) -> None:
    taken = [case for case in BEYOND if vllm(case.path, json.dumps(case.body).encode(), JSON).status_code == 200]
    assert taken == BEYOND


@pytest.mark.parametrize(("content", "kind", "status"), RAW, ids=lambda value: str(value)[:40])
def test_bodies_as_bytes(vllm: Post, ours: Post, content: bytes, kind: str, status: int) -> None:
    for post in (vllm, ours):
        check_raw(post, content, kind, status)


@pytest.mark.parametrize("case", [*TABLE, *BEYOND, *context_cases(MAX_MODEL_LEN)], ids=str)
def test_our_servers_follow_the_table(ours: Post, case: Case) -> None:
    check_verdict(ours, case)


def test_a_body_that_is_too_large(ours: Post) -> None:
    check_raw(ours, TOO_LARGE, JSON, 413)


ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "1", "0.5", "true", "no", "none", "text", "a@b", "2.0", " 3 ", "tea"]),
    st.lists(st.one_of(st.integers(-1, 400), st.text("tea ", max_size=3), st.none()), max_size=6),
    st.dictionaries(
        st.sampled_from(["type", "text", "include_usage", "1", "role"]), st.none() | st.text("t"), max_size=2
    ),
)
BEYOND_OURS = {name for case in BEYOND for name in case.fields}
FIELDS = sorted({name for case in TABLE for name in case.fields} - BEYOND_OURS - {"messages", "prompt", "n"})
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "banana"])},
            optional={"content": st.just("tea") | ODD, "name": ODD, "tool_calls": ODD, "more": ODD},
        ),
        ODD,
    ),
    max_size=3,
)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_mutated_bodies_get_one_verdict(vllm: Post, ours: Post, path: str) -> None:
    """No 5xx either. Fields that vLLM honours and our engines can't are the table's. An empty question is one to vLLM,
    and none to ai100.
    """

    @given(
        st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3),
        st.fixed_dictionaries({}, optional={"messages": MESSAGES} if path == CHAT else {"prompt": ODD}),
    )
    @settings(
        max_examples=150,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    def run(fields: dict[str, Any], prompt: dict[str, Any]) -> None:
        body = json.dumps(GOOD[path] | fields | prompt).encode()
        theirs, own = vllm(path, body, JSON), ours(path, body, JSON)
        assert own.status_code < 500, own.text
        if own.status_code == 400 and "the message is empty" in own.text:
            return
        assert (own.status_code < 400) == (theirs.status_code < 400), (body, theirs.text, own.text)

    run()
