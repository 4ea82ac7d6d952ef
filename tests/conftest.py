"""The quick tests first, those of the whole stack last.

Side by side it is the other way round: one worker starts with the whole stack, the others with the longest files, so
that no core is left alone at the end.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

HAS_FAILED = pytest.StashKey[bool]()
KINDS = ("e2e", "browser", "slow")
STACK = "tests/e2e/stack/"
"""The tests of the whole stack: one worker has all of them, for it is started once."""

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def empty_home(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """No test works on the state of the stack that a developer runs, or on the model that was converted for it.

    What vLLM finds out about a model's class is kept for all tests: each time takes another import of vLLM.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "KVARENA_HOME" not in os.environ:
            patch.setenv("KVARENA_HOME", str(tmp_path_factory.mktemp("home")))
        if "VLLM_CACHE_ROOT" not in os.environ:
            patch.setenv("VLLM_CACHE_ROOT", str(pytestconfig.rootpath / ".pytest_cache" / "vllm"))
        yield


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """With our loggers on and heard: a library that configures logging, in a test before this one, turns the others'
    off or raises the level of all, and a server's own log keeps its lines to itself.
    """
    logging.disable(logging.NOTSET)
    caplog.set_level(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in ("kvarena", "ai100"):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
    return caplog


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of real servers or a real browser is tried once more: it waits for other processes, and now and then for
    a moment that a busy machine skips. What failed first and then passed is listed at the end of the run.
    """
    for item in items:
        if config.getoption("reruns", 0) is None and "slow" in item.keywords:
            item.add_marker(pytest.mark.flaky(reruns=1))
    if hasattr(config, "workerinput"):
        longest = longest_first(items)
        items.sort(key=lambda item: (kind(item), longest.index(item.path)))
    else:
        items.sort(key=lambda item: -kind(item))


class OneStack(LoadFileScheduling):
    """A file goes to one worker, as with `--dist loadfile`, and all over the whole stack to one."""

    def _split_scope(self, nodeid: str) -> str:
        return STACK if nodeid.startswith(STACK) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneStack:
    return OneStack(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What comes after a failure begins with new servers, also its second try: the old ones remember what was asked.
    So does what comes after the whole stack, which has much memory, and after the browser, whose driver keeps an event
    loop running in the test's own thread.

    Before pytest-rerunfailures, which would keep them. There is no public way to end wider fixtures early.
    """
    has_browser = kind(item) <= KINDS.index("browser")
    if item.stash.get(HAS_FAILED, False) or (nextitem and has_browser and kind(nextitem) != kind(item)):
        item.session._setupstate.teardown_exact(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "setup":
        item.stash[HAS_FAILED] = False
    if report.failed and item.get_closest_marker("flaky"):
        item.stash[HAS_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported is never garbage, and much to look through, meanwhile and later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries tell at the end what they think has leaked


def kind(item: pytest.Item) -> int:
    """By `KINDS`, and then all others."""
    return next((number for number, name in enumerate(KINDS) if item.get_closest_marker(name)), len(KINDS))


def longest_first(items: list[pytest.Item]) -> list[Path]:
    """The files, by the time that all of their tests may take."""
    allowed_s: Counter[Path] = Counter()
    for item in items:
        marker = item.get_closest_marker("timeout")
        allowed_s[item.path] += marker.args[0] if marker else 1
    return [path for path, _ in allowed_s.most_common()]
