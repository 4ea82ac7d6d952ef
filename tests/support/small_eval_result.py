"""A result of `kvarena eval` as it could be: full prefill, two policies, eight questions of two kinds."""

from __future__ import annotations

from typing import Any

RATIOS = (0.1, 0.5)
VARIANTS: list[dict[str, Any]] = [
    {"contender": "plain", "policy": None, "ratio": None, "check_layer": None},
    {"contender": "blend", "policy": "none", "ratio": 0.0, "check_layer": 1},
    *({"contender": "blend", "policy": "kv_deviation", "ratio": ratio, "check_layer": 1} for ratio in RATIOS),
]
KINDS = ("single", "across")
NUM_EACH = 4


def small_eval_result() -> dict[str, Any]:
    """`none` misses what is `across`, and its first request failed; the others are right, but for a changed word."""
    questions = [
        {"question": f"What does Ann drink, {kind} {index}?", "answers": ["cider"], "kind": kind, "chunks": ["a"]}
        for kind in KINDS
        for index in range(NUM_EACH)
    ]
    return {
        "settings": {
            "benchmark": "eval",
            "engine": "http",
            "num_questions": 8,
            "reference": "plain",
            "contenders": {name: {"url": "http://127.0.0.1:8000", "model": "town"} for name in ("plain", "blend")},
        },
        "versions": {},
        "machine": {"cpu": "A small one", "num_cores": 2},
        "rows": [
            _row(variant, kind, subset)
            for variant in VARIANTS
            for kind in ("all", *KINDS)
            for subset in ("all", "answered")
        ],
        "answers": [_answer(variant, index) for variant in VARIANTS for index in range(len(questions))],
        "questions": questions,
    }


def _row(variant: dict[str, Any], kind: str, subset: str) -> dict[str, Any]:
    blends, num_questions = (
        variant["policy"] is not None,
        (NUM_EACH - (subset == "answered")) * (2 if kind == "all" else 1),
    )
    mean = 0.5 if variant["policy"] == "none" else 0.9
    return {
        **variant,
        "kind": kind,
        "subset": subset,
        "num_questions": num_questions,
        "num_failed": int(variant["policy"] == "none" and kind != "across"),
        "num_cut": 0,
        "correct": _interval(mean),
        "exact_match": _interval(mean),
        "f1": _interval(mean),
        "correct_vs_reference": _interval(mean - 0.9) if blends else None,
        "exact_match_vs_reference": _interval(mean - 0.9) if blends else None,
        "agreement": _interval(mean) if blends else None,
        "token_agreement": _interval(mean) if blends else None,
        "kl_along_answer": _interval(1 - mean) if blends else None,
        "kl_method": "teacher_forced" if blends else None,
        "first_token_kl": None,
        "ttft_ms": {"median": 40.0 + 100 * (variant["ratio"] or 1) if blends else 200.0, "p95": 250.0},
        "reused_ratio": 0.8 if blends else 0.0,
        "recomputed_ratio": variant["ratio"],
    }


def _interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def _answer(variant: dict[str, Any], index: int) -> dict[str, Any]:
    blind = variant["policy"] == "none"
    failed, right = blind and index == 0, not (blind and index >= NUM_EACH)
    return {
        **variant,
        "question": index,
        "text": "" if failed else "cider" if right else "milk",
        "outcome": "failed" if failed else "answered",
        "is_complete": None if failed else True,
        "correct": None if failed else float(right),
        "exact_match": None if failed else float(right),
        "f1": None if failed else float(right),
        "ttft_ms": None if failed else 100.0,
        "detail": "HTTP 500" if failed else "",
    }
