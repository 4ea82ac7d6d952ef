"""Reports are found by the whole id of an answer, and by nothing shorter."""

from __future__ import annotations

import pytest

from kvarena.engines.base import ReportLog


def log_of(*request_ids: str) -> ReportLog:
    log = ReportLog()
    for number, request_id in enumerate(request_ids):
        log.add({"request_id": request_id, "number": number})
    return log


@pytest.mark.parametrize(
    "kept",
    ["chatcmpl-4f2a", "chatcmpl-4f2a-0", "chatcmpl-4f2a-12", "chatcmpl-4f2a_1", "1_chatcmpl-4f2a", "0_cmpl-4f2a-3"],
)
def test_an_answers_requests_are_found_by_its_id(kept: str) -> None:
    answer_id = "cmpl-4f2a" if "_cmpl" in kept else "chatcmpl-4f2a"
    assert log_of("chatcmpl-other", kept, "another").get(answer_id) == {"request_id": answer_id, "number": 1}


@pytest.mark.parametrize(
    "guess", ["chatcmpl", "chatcmpl-", "chatcmpl-4f2", "4f2a", "", "0", "chatcmpl-4f2a-0-1", "-0", "_0"]
)
def test_a_part_of_an_id_finds_and_forgets_nothing(guess: str) -> None:
    log = log_of("chatcmpl-4f2a-0")
    assert log.get(guess) is None
    log.forget(guess)
    assert log.get("chatcmpl-4f2a") is not None


def test_the_newest_is_found_and_all_are_forgotten() -> None:
    log = log_of("0_chatcmpl-a", "1_chatcmpl-a", "chatcmpl-b")
    found = log.get("chatcmpl-a")
    assert found is not None
    assert found["number"] == 1
    log.forget("chatcmpl-a")
    assert log.get("chatcmpl-a") is None
    assert log.get("chatcmpl-b") is not None


def test_long_reports_leave_before_there_are_many() -> None:
    log = ReportLog(max_values=1000)
    for number in range(100):
        log.add({"request_id": f"chatcmpl-{number}", "recomputed_spans": [(at, at + 1) for at in range(200)]})
    kept = [number for number in range(100) if log.get(f"chatcmpl-{number}")]
    assert kept == [98, 99]
    log.add({"request_id": "chatcmpl-long", "recomputed_spans": [(at, at + 1) for at in range(5000)]})
    assert log.get("chatcmpl-long"), "the newest is kept"
    log.forget("chatcmpl-long")
    for number in range(3):
        log.add({"request_id": f"chatcmpl-{number}", "recomputed_spans": []})
    assert all(log.get(f"chatcmpl-{number}") for number in range(3))
