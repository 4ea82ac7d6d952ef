"""Quality: how good each variant's answers are and how soon they begin, and the charts of every other result file.

Draws result files; asks no server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

import state
from chat_view import literal
from comparing import comparison
from eval_results import (
    ALL_QUESTIONS,
    EvalResult,
    answer_table,
    metrics_of,
    problems,
    read_eval,
    summary,
    table,
)
from kvarena.panels.kinds import EVAL, panels_of, result_summary
from kvarena.panels.panel import ALL_KINDS, colours_in, grouped
from kvarena.panels.quality import metric_title, rows_with, share_panel, time_panel
from panel_charts import draw_panels
from result_picker import UPLOADED, Opened, pick_result

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
    "KL": "Divergence of the first token's probabilities from full prefill's; lower is better",
    "Reused": "Share of the prompt that wasn't computed",
    "Cut": "Answers that didn't end within the tokens allowed; in older files those that were not scored",
    "Right": "Answers that contain a gold answer",
    "vs. full prefill": "Right answers, less those of the reference on the same questions",
    "Tokens": "Share of full prefill's answer tokens that are predicted here too, given the ones before them",
    "KL along answer": "KL in nats from full prefill's next-token probabilities along its answer; lower is better",
}


def main() -> None:
    st.html('<div class="ka-title">Quality<small>what reused KV costs in answers, and buys in time</small></div>')
    try:
        picked = pick_result()
    except ValueError as error:  # of the settings
        st.error(str(error))
        st.stop()
    if picked is None:
        st.stop()
    place = st.empty()
    chosen, other = picked
    if chosen.benchmark == EVAL:
        draw_eval(chosen, other)
    else:
        st.caption(result_summary(chosen.result))
        if other:
            draw_comparison(chosen, other)
        draw_panels(panels_of(chosen.result))
        draw_rows(chosen.result)
    state.send_links()
    draw_unknown(place)


def draw_unknown(place: DeltaGenerator) -> None:
    """Names choices of the page's address that don't exist. A file from elsewhere doesn't survive a reload."""
    unknown = state.unknown_links()
    told = ["The file from elsewhere has to be opened again." for one in unknown if one.linked == UPLOADED]
    told += [
        f"{one.label}: the page's address names {literal(one.linked)}, which isn't here."
        for one in unknown
        if one.linked != UPLOADED
    ]
    if told:
        place.warning(" ".join(told), icon=":material/link_off:")


def draw_eval(chosen: Opened, other: Opened | None) -> None:
    result = read_eval(chosen.result)
    st.caption(summary(result))
    metric, kind, subset = choose_view(result)
    if other:
        draw_comparison(chosen, other, metric)
    draw_charts(chosen, metric, kind, subset)
    draw_table(result, kind, subset)
    draw_answers(result, kind)


def draw_comparison(chosen: Opened, other: Opened, metric: str = "") -> None:
    st.caption(f"Compared with {other.title} · {result_summary(other.result)}")
    found = comparison(chosen.result, other.result, metric)
    draw_panels(found)
    if not found:
        st.info("The two files have no measurements in common.")


def draw_rows(result: Mapping[str, Any]) -> None:
    """As they are in the file, nested figures in columns of their own; with a table for each `measure`, if rows have
    one.
    """
    for measure, rows in grouped(result["rows"], lambda row: str(row.get("measure", ""))).items():
        st.markdown(f"**{measure.capitalize() or 'Figures'}**")
        frame = pd.json_normalize(rows, sep=" ").dropna(axis="columns", how="all")
        st.dataframe(frame, hide_index=True, placeholder="–", key=f"rows-{measure}")


def choose_view(result: EvalResult) -> tuple[str, str, str]:
    metrics = metrics_of(result)
    subset: str | None = ALL_QUESTIONS
    for name, choices in (("metric", metrics), ("kind", result.kinds), ("subset", result.subsets)):
        state.choose_linked(name, choices, name.capitalize())
        usual, before = next(iter(choices)), st.session_state.get(f"usual-{name}")
        if st.session_state.get(name) not in choices or st.session_state[name] == before:
            st.session_state[name] = usual  # nobody chose what another file began with
        st.session_state[f"usual-{name}"] = usual
    left, right = st.columns(2)
    with left:
        key = st.pills(
            "Metric",
            metrics,
            format_func=metric_title,
            required=True,
            key="metric",
            persist_state="session",
        )
    with right:
        kind = st.pills("Questions", result.kinds, required=True, key="kind", persist_state="session")
        if len(result.subsets) > 1:
            subset = st.pills(
                "Of these",
                result.subsets,
                format_func=lambda subset: SUBSET_TITLES[subset],
                required=True,
                key="subset",
                persist_state="session",
                help="All questions, or only those that full prefill answers right",
            )
    for name in ("metric", "kind", "subset"):
        state.link(name, st.session_state[name])
    return key or metrics[0], kind or result.kinds[0], subset or ALL_QUESTIONS


def draw_charts(chosen: Opened, metric: str, kind: str, subset: str) -> None:
    asked = [r for r in chosen.result["rows"] if (r["kind"], r.get("subset") or ALL_QUESTIONS) == (kind, subset)]
    rows = rows_with(asked, metric)
    if not rows:
        st.info(f"This file has no figures of “{metric_title(metric)}” for these questions.")
        return
    shown, colours = f"{kind} questions", colours_in([chosen.result])
    draw_panels([draw(rows, metric, shown, colours) for draw in (share_panel, time_panel)])


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
            default=sorted(result.variants, key=lambda variant: variant != result.reference)[:NUM_ANSWER_COLUMNS],
        )
        only_different = st.toggle(
            "Only where they differ from full prefill", disabled=result.reference is None, key="only-different"
        )
        answers = answer_table(result, kind, chosen, only_different)
        if answers:
            st.dataframe(pd.DataFrame(answers), hide_index=True, placeholder="–", key="answer-table")
        else:
            st.caption("No answer differs." if only_different else "The file has no single answers of this kind.")


main()
