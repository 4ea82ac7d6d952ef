"""The quick tests first, the browser's last: its driver keeps an event loop running in the test's own thread.

Side by side the slow ones come first, so that no core is left alone with them at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test works on the state of the stack that a developer runs, or on the model that was converted for it."""
    with pytest.MonkeyPatch.context() as patch:
        if "KVARENA_HOME" not in os.environ:
            patch.setenv("KVARENA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_side_by_side = hasattr(config, "workerinput")
    items.sort(key=lambda item: ("e2e" in item.keywords, ("slow" in item.keywords) != is_side_by_side))
