"""Schemathesis on one path of a server: nothing that its document allows or forbids breaks it."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

TIMEOUT_S = 60
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


def check_operation(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    """A body that the document allows may still be refused: the context's length and the vocabulary aren't in it. One
    that it forbids may still be taken, as vLLM takes `"16"`.
    """
    operation = document[path][method]

    @given(data=st.data())
    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def run(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.call_and_validate(timeout=TIMEOUT_S, excluded_checks=[positive_data_acceptance, negative_data_rejection])

    run()
