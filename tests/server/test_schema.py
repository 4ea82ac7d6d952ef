"""Schemathesis tries what the OpenAPI document allows and what it doesn't: nothing may break the server."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from kvarena.server.app import create_app
from support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow

schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(ScriptedEngine()))


@schema.parametrize()
@settings(
    max_examples=50,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_breaks_the_server(case: Any) -> None:
    """No 5xx, and every answer is one that the document has: its status, its content type and its shape.

    What a document can't say (a field that needs another one, the vocabulary's size) may still be refused, and what can
    be converted to a field's type is taken: `test_verdicts.py` has both.
    """
    case.call_and_validate(excluded_checks=[positive_data_acceptance, negative_data_rejection])
