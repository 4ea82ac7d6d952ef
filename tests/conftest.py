"""The quick tests first, the browser's last: its driver keeps an event loop running in the test's own thread."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ("e2e" in item.keywords, "slow" in item.keywords))
