"""Quality: how good the answers of each variant are, and how soon they begin. Draws result files, asks nobody."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from eval_charts import recomputed_chart, time_chart
from eval_results import ALL_KINDS, ALL_QUESTIONS, EvalResult, Variant
from eval_tables import Metric, answer_table, lines, metrics_of, points, problems, summary, table, variant_name
from result_picker import pick_result

NUM_ANSWER_COLUMNS = 4
SUBSET_TITLES = {ALL_QUESTIONS: "all", "answered": "full prefill right"}
SHARES = (
    "Ratio",
    "Right",
    "vs. full prefill",
    "Tokens",
    "Exact match",
    "EM low",
    "EM high",
    "vs. reference",
    "Token F1",
    "Agreement",
    "Reused",
)
HELP = {
    "EM low": "Lower end of the interval of the exact match",
    "EM high": "Upper end of the interval of the exact match",
    "vs. reference": "Exact match, less that of the reference on the same questions",
    "KL": "Of the first token's probabilities, from full prefill's; lower is better",
    "Reused": "Share of the prompt that was not computed anew",
    "Cut": "Answers that didn't end within the tokens allowed; in older files those that were not scored",
    "Right": "Answers that contain a gold answer",
    "vs. full prefill": "Right answers, less those of the reference on the same questions",
    "Tokens": "Share of full prefill's answer tokens that come out here too, after the same ones before them",
    "KL along answer": "Of the next tokens' probabilities along full prefill's answer, nats; lower is better",
}


def main() -> None:
    st.html('<div class="ka-title">Quality<small>what reused KV costs in answers, and buys in time</small></div>')
    try:
        result = pick_result()
    except ValueError as error:  # of the settings
        st.error(str(error))
        st.stop()
    if result is None:
        st.stop()
    st.caption(summary(result))
    metric, kind, subset = choose_view(result)
    draw_charts(result, metric, kind, subset)
    draw_table(result, kind, subset)
    draw_answers(result, kind)


def choose_view(result: EvalResult) -> tuple[Metric, str, str]:
    metrics = metrics_of(result)
    subset: str | None = ALL_QUESTIONS
    for name, choices in (("metric", metrics), ("kind", result.kinds), ("subset", result.subsets)):
        if st.session_state.get(name) not in choices:
            st.session_state[name] = next(iter(choices))
    left, right = st.columns(2)
    with left:
        key = st.segmented_control(
            "Metric",
            list(metrics),
            format_func=lambda key: metrics[key].title,
            required=True,
            key="metric",
            persist_state="session",
        )
    with right:
        kind = st.segmented_control("Questions", result.kinds, required=True, key="kind", persist_state="session")
        if len(result.subsets) > 1:
            subset = st.segmented_control(
                "Of these",
                result.subsets,
                format_func=lambda subset: SUBSET_TITLES[subset],
                required=True,
                key="subset",
                persist_state="session",
                help="All, or those alone that full prefill answers right",
            )
    return metrics[key or next(iter(metrics))], kind or result.kinds[0], subset or ALL_QUESTIONS


def draw_charts(result: EvalResult, metric: Metric, kind: str, subset: str) -> None:
    records = points(result, kind, metric, subset)
    if not records:
        st.info(f"This file has no figures of “{metric.title}” for these questions.")
        return
    for column, title, chart in zip(
        st.columns(2, gap="large"),
        ("By what is recomputed", "By the time to the first token"),
        (recomputed_chart(records, metric, lines(result)), time_chart(records, metric, lines(result))),
        strict=True,
    ):
        with column:
            st.markdown(f"**{title}**")
            st.altair_chart(chart, width="stretch")


def draw_table(result: EvalResult, kind: str, subset: str) -> None:
    st.markdown("**Figures**" if kind == ALL_KINDS else f"**Figures**, questions of the kind {kind}")
    if problem := problems(result, kind, subset):
        st.warning(problem)
    frame = pd.DataFrame(table(result, kind, subset))
    columns = {name: st.column_config.NumberColumn(format="percent", help=HELP.get(name)) for name in SHARES}
    columns |= {name: st.column_config.NumberColumn(format="%.0f ms") for name in ("TTFT median", "TTFT p95")}
    columns |= {
        name: st.column_config.NumberColumn(format="%.4f", help=HELP[name]) for name in ("KL", "KL along answer")
    }
    columns["Cut"] = st.column_config.NumberColumn(help=HELP["Cut"])
    st.dataframe(frame, hide_index=True, column_config=columns, height="content", placeholder="–", key="figures")


def draw_answers(result: EvalResult, kind: str) -> None:
    if not result.answers:
        return
    with st.expander("Single answers", key="answers"):
        chosen = st.multiselect(
            "Answers of",
            result.variants,
            default=reference_first(result)[:NUM_ANSWER_COLUMNS],
            format_func=lambda variant: variant_name(result, variant),
        )
        only_different = st.toggle(
            "Only where they differ from full prefill", disabled=result.reference is None, key="only-different"
        )
        answers = answer_table(result, kind, chosen, only_different)
        if answers:
            st.dataframe(pd.DataFrame(answers), hide_index=True, placeholder="–", key="answer-table")
        else:
            st.caption("No answer differs." if only_different else "The file has no single answers of this kind.")


def reference_first(result: EvalResult) -> list[Variant]:
    return sorted(result.variants, key=lambda variant: variant != result.reference)


main()
