"""A policy is one file: the example of CONTRIBUTING.md, put into a copy of the package, is found everywhere.

What each program prints is of that copy, in a process of its own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvarena.policies.registry import calibrated_policies
from support.project_copy import copy_project, example_of, run_in

LIGHT = """
import json, sys
from pathlib import Path
from kvarena.bench.variants import read_policy
from kvarena.engines.vllm.config import BlendConfig, read_request_params
from kvarena.policies.params import PARAMETERS, POLICIES, BlendParams
from kvarena.policies.registry import calibrated_policies
from kvarena.stack.generate import generated
from kvarena.home import Home
from kvarena.stack.plan import make_plan
from kvarena.stack.services import build_services
from kvarena.stack.settings import load_settings

def refusal(**given):
    try:
        read_request_params({"kvarena": given}, BlendParams())
    except ValueError as error:
        return str(error)

home = Home(Path(sys.argv[1]))
settings = load_settings(Path(sys.argv[1]) / ".env", contenders="blend,simllm", profile="cpu", model=sys.argv[2])
services = {service.name: service for service in build_services(make_plan(settings, home), home)}
asked = read_request_params({"kvarena": {"policy": "chunk_tail", "skip_tokens": 3}}, BlendParams())
print(json.dumps({
    "policies": POLICIES,
    "parameters": list(PARAMETERS),
    "asked": vars(asked.blend),
    "refusals": [refusal(skip_tokens=5000), refusal(skip_tokens="x"), refusal(skipped=1)],
    "setting": settings.blend_skip_tokens,
    "config": json.loads(services["blend"].command[services["blend"].command.index("--kv-transfer-config") + 1]),
    "simllm": services["simllm"].command,
    "variant": read_policy("chunk_tail:0.1,skip_tokens=4", "blend").label,
    "calibrated": calibrated_policies(),
    "supported": BlendConfig(policy="chunk_tail", skip_tokens=2).to_extra_config(),
    "generated": {path.name: text for path, text in generated(Path(sys.argv[2]).parents[2]).items()},
    "torch": "torch" in sys.modules,
}))
"""
SELECTION = """
import json
from kvarena.core.plan import Chunk, ReusePlan, Span, as_token_ids
from kvarena.policies.params import BlendParams, make_policy

chunk = Chunk(as_token_ids(range(100)))
plan = ReusePlan((Span(7, 47, chunk), Span(60, 120, chunk, 40)))
policy = make_policy(BlendParams("chunk_tail", 0.05, skip_tokens=2))
print(json.dumps(policy.select(plan, None).positions.tolist()))
"""
DESCRIPTION = """
import asyncio, json
from types import SimpleNamespace
import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from kvarena.engines.vllm.config import BlendConfig
from kvarena.engines.vllm.middleware import KVArenaMiddleware

async def collective_rpc(method):
    return [""]

app = Starlette(middleware=[Middleware(KVArenaMiddleware)])
app.state.engine_client = SimpleNamespace(collective_rpc=collective_rpc)
app.state.vllm_config = SimpleNamespace(
    kv_transfer_config=SimpleNamespace(kv_connector_extra_config=BlendConfig(skip_tokens=6).to_extra_config()),
    model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4)),
)

async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://blend") as http:
        return (await http.get("/kvarena")).json()

print(json.dumps(asyncio.run(ask())))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_project(tmp_path_factory.mktemp("project"))
    (copy / "backend" / "kvarena" / "policies" / "chunk_tail.py").write_text(example_of("Add a policy"))
    return copy


@pytest.fixture(scope="module")
def found(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home, model = tmp_path_factory.mktemp("home"), copy / "backend" / "models" / "town"
    settings = {"BLEND_SKIP_TOKENS": "7", "BLEND_POLICY": "chunk_tail"}
    read: dict[str, Any] = json.loads(run_in(copy, "-c", LIGHT, str(home), str(model), **settings))
    return read


def test_requests_take_it(found: dict[str, Any]) -> None:
    assert "chunk_tail" in found["policies"]
    assert found["policies"][0] == "kv_deviation"
    assert "skip_tokens" in found["parameters"]
    assert (found["asked"]["policy"], found["asked"]["skip_tokens"]) == ("chunk_tail", 3)
    too_many, no_number, unknown = found["refusals"]
    assert too_many == "skip_tokens must be a number of tokens from 0 to 1024, not 5000"
    assert no_number == "skip_tokens must be a number of tokens from 0 to 1024, not 'x'"
    assert "has no 'skipped'; it takes" in unknown
    assert "skip_tokens" in unknown


def test_the_stack_hands_it_on(found: dict[str, Any]) -> None:
    assert found["setting"] == 7
    config = found["config"]["kv_connector_extra_config"]
    assert (config["policy"], config["skip_tokens"]) == ("chunk_tail", 7)
    assert found["supported"]["skip_tokens"] == 2
    command = found["simllm"]
    assert command[command.index("--skip-tokens") + 1] == "7"
    assert command[command.index("--policy") + 1] == "chunk_tail"


def test_the_benchmark_names_it(found: dict[str, Any]) -> None:
    assert found["variant"] == "blend chunk_tail (skip_tokens 4) 10 %"


def test_calibration_tries_it(found: dict[str, Any]) -> None:
    assert set(found["calibrated"]) == {*calibrated_policies(), "chunk_tail"}


def test_it_is_in_the_generated_files(found: dict[str, Any]) -> None:
    example = found["generated"][".env.example"]
    assert "\n#   chunk_tail: The last tokens of each chunk.\n" in example
    assert (
        "\n# chunk_tail: Number of tokens to skip at the end of each chunk. From 0 to 1024.\n#BLEND_SKIP_TOKENS=0\n"
        in example
    )
    assert "\n  BLEND_SKIP_TOKENS:\n" in found["generated"]["compose.yaml"]


def test_all_that_needs_no_torch(found: dict[str, Any]) -> None:
    assert found["torch"] is False


def test_it_selects(copy: Path) -> None:
    assert json.loads(run_in(copy, "-c", SELECTION)) == [43, 44, 115, 116, 117]


def test_simllm_has_an_option_for_it(copy: Path) -> None:
    said = " ".join(re.sub(r"[│╭╰─]", " ", run_in(copy, "-m", "kvarena.contenders.simllm", "--help")).split())
    assert "--skip-tokens <int> Number of tokens to skip at the end of each chunk. From 0 to 1024." in said
    assert "chunk_head, chunk_tail, query_attention" in said


def test_the_server_describes_it(copy: Path) -> None:
    pytest.importorskip("vllm")
    told = json.loads(run_in(copy, "-c", DESCRIPTION).splitlines()[-1])
    assert "chunk_tail" in told["policies"]
    assert "chunk_tail" in told["timed_policies"]
    assert told["defaults"]["skip_tokens"] == 6
    assert told["parameters"]["skip_tokens"] == {
        "type": "integer",
        "at_least": 0,
        "at_most": 1024,
        "default": 0,
        "help": "Number of tokens to skip at the end of each chunk.",
        "policies": ["chunk_tail"],
    }
    assert "chunk_tail" in told["parameters"]["ratio"]["policies"]
    assert told["parameters"]["policy"]["choices"] == told["policies"]
