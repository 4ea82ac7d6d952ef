"""The quick tests first, the browser's last: its driver keeps an event loop running in the test's own thread.

Side by side the slow ones come first, so that no core is left alone with them at the end.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_side_by_side = hasattr(config, "workerinput")
    items.sort(key=lambda item: ("e2e" in item.keywords, ("slow" in item.keywords) != is_side_by_side))
