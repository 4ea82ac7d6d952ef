"""The picture of an AI 100 benchmark: time to first token turn by turn, and throughput."""

from __future__ import annotations

from pathlib import Path

from kvarena.bench.results import load_results

SLOTS, NO_CACHE = "#c2571a", "#8a8a8a"


def plot(result_path: Path, image_path: Path) -> None:
    """Raises `ValueError` when the file holds no AI 100 benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = load_results(result_path)
    if result.get("settings", {}).get("benchmark") != "ai100":
        raise ValueError(f"{result_path} holds no ai100 benchmark")
    turns = [row for row in result["rows"] if row["measure"] == "first token"]
    modes = [row for row in result["rows"] if row["measure"] == "throughput"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), width_ratios=(2, 1), layout="constrained")
    for key, label, colour in (("no_cache_ttft_ms", "no cache", NO_CACHE), ("slots_ttft_ms", "KV slots", SLOTS)):
        times = [row[key]["median"] for row in turns]
        left.plot([row["turn"] for row in turns], times, color=colour, marker="o", markersize=4, label=label)
    left.set(yscale="log", xlabel="turn", ylabel="time to first token (ms), median")
    left.set_xticks([row["turn"] for row in turns])
    left.grid(visible=True, which="major", alpha=0.3)
    left.legend()
    names = [row["mode"].replace(" the other", "\nthe other") for row in modes]
    right.bar(names, [row["tokens_per_s"]["median"] for row in modes], color=[SLOTS, NO_CACHE])
    right.set(ylabel=f"tokens per second, {modes[0]['num_conversations']} conversations")
    figure.savefig(image_path, dpi=150)
    pyplot.close(figure)
