"""What a contender says of itself decides what it is asked, and whether its reports are fetched."""

from __future__ import annotations

from typing import Any

import pytest

from contender_api import Sampling, Server, completion_request
from kvarena.client import ServerInfo
from support.small_openai_server import SIMLLM_OFFER

BLEND = {"contender": "blend", "policies": ["none"], "defaults": {"policy": "none", "ratio": 0.1}, "separator": "|"}


@pytest.mark.parametrize(
    ("offer", "report", "blends", "keeps_reports"),
    [
        (None, "", False, False),
        (None, "blend", False, False),
        (BLEND, "blend", True, True),
        ({"contender": "prefix", "defaults": {}}, "", False, True),
    ],
)
def test_what_a_server_is(offer: dict[str, Any] | None, report: str, blends: bool, keeps_reports: bool) -> None:
    server = Server.read(ServerInfo("town", max_model_len=4096, offer=offer), report)
    assert (server.model, server.max_model_len) == ("town", 4096)
    assert (server.blend is not None, server.keeps_reports) == (blends, keeps_reports)
    body = completion_request(server, [], Sampling(recomputing={"policy": "none", "ratio": 0.5}, mode="top_layer"))
    assert ("kv_transfer_params" in body) == blends


def test_each_kind_of_contender_gets_its_own_choices() -> None:
    chosen = Sampling(recomputing={"policy": "none", "ratio": 0.5}, mode="top_layer", similarity_threshold=0.9)
    blend = Server.read(ServerInfo("town", offer=BLEND), "blend")
    simllm = Server.read(ServerInfo("town", offer=SIMLLM_OFFER), "similar_task")
    assert simllm.simllm is not None
    assert (simllm.simllm.mode, simllm.simllm.similarity_threshold) == ("aligned", 0.998)
    assert completion_request(blend, [], chosen)["kv_transfer_params"]["kvarena"] == {"policy": "none", "ratio": 0.5}
    to_simllm = completion_request(simllm, [], chosen)["kv_transfer_params"]["kvarena"]
    assert to_simllm == {"mode": "top_layer", "similarity_threshold": 0.9}
    assert "kv_transfer_params" not in completion_request(simllm, [], Sampling())
