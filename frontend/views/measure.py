"""Measure: many questions, or own questions over many orders of the chunks, or contexts of several lengths, to the
chosen contenders and settings.

One measurement at a time for all tabs, since two would slow each other down. It goes on when the page is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

import state
from chat import Context
from chat_session import ChatSession
from chat_view import literal
from contender_api import POLICY, RATIO, BlendOffer
from context_lengths import LEAST_PAIRS, failures, length_verdicts, lengths_table, verdicts_html
from documents_view import loaded_chunks, uploads
from eval_results import cached_note, measured_panels, measured_table, read_eval, read_result, times
from examples import gold_answer
from kvarena.documents import QUESTIONS_NAME
from kvarena.panels.kinds import TTFT
from kvarena.panels.panel import REFERENCE, colours_in
from kvarena.panels.speed import ttft_panels
from kvarena.splitting import ESTIMATED_BYTES_PER_TOKEN
from measuring import (
    LengthsPlan,
    Measurement,
    Plan,
    QuestionsPlan,
    blend_settings,
    default_lengths,
    folder_for_results,
    install_command,
    missing_for_measuring,
    new_output,
    read_lengths,
    read_own_questions,
    readable_time,
    write_documents,
    write_own_questions,
)
from panel_charts import draw_chart, draw_panels, ttft_chart
from result_picker import choose_file
from settings import Contender
from sidebar import begin_arena, parameter_key

POLL_S = 0.5
CONTAINER = "kvarena-page"  # as compose.yaml calls it
QUESTIONS, OWN, LENGTHS = "Questions of the folder", "My own questions", "Context lengths"
DEFAULT_REPEATS = 6
USUAL_RATIO = 0.15
STOPPING = "Stopping: saving what was answered"
NO_FIGURES = "Stopped before the first answer: there are no figures."
NOT_SAVED = "Ended before the answers were saved: there are no figures."
SPEEDUP_HELP = {
    "Speedup": "Plain's time to first token divided by this one's, prompt by prompt; the median",
    "Low": "Lower end of its 95 % interval; with fewer than six repetitions the lowest value",
    "High": "Upper end of its 95 % interval; with fewer than six repetitions the highest value",
}


@st.cache_resource(show_spinner=False)
def _measurements() -> list[Measurement]:
    """The latest one last."""
    return []


def main() -> None:
    st.html('<div class="ka-title">Measure<small>many questions, because a single one proves little</small></div>')
    if missing := missing_for_measuring():
        st.warning(
            f"Measuring needs packages that are not installed beside this page: {', '.join(missing)}. This command "
            "installs them; then reload the page."
        )
        st.code(install_command(), language="sh", wrap_lines=True)
        return
    try:
        sessions = state.chat_sessions()
        state.refresh_servers(sessions)
        draw_choices(list(sessions.values()))
    except ValueError as error:
        st.error(str(error))
        st.stop()
    if _measurements():
        draw_measurement(_measurements()[-1])


# Gets the result's file, beside which it may write what is to be asked; raises `OSError`. No docstring: Streamlit would
# show it on the page.
MakePlan = Callable[[Path], Plan]


def draw_choices(sessions: Sequence[ChatSession]) -> None:
    titles = {session.contender: session.contender.title for session in sessions}
    contenders = st.multiselect(
        "Contenders",
        list(titles),
        default=list(titles),
        format_func=lambda contender: titles[contender],
        **state.linked("measured"),
    )
    questions = state.page_settings().data_dir / QUESTIONS_NAME
    offered = [QUESTIONS, OWN, LENGTHS] if questions.is_file() else [OWN, LENGTHS]
    what = st.segmented_control(
        "Ask",
        offered,
        default=offered[0],
        required=True,
        **state.linked(f"measure-what-{len(offered)}"),
    )
    if what != LENGTHS and not questions.is_file():
        st.info(
            f"There is no {questions}. You can ask questions of your own over many orders of the arena's chunks: how "
            "often the answers are full prefill's can be measured without knowing the right ones."
        )
    if what == LENGTHS:
        make_plan = _draw_lengths(tuple(contenders), [one for one in sessions if one.contender in contenders])
    else:
        make_plan = _draw_questions(tuple(contenders), questions if what == QUESTIONS else None)
    running = bool(_measurements()) and _measurements()[-1].is_running
    ready = bool(contenders) and make_plan is not None
    if st.button("Start", key="measure-start", type="primary", disabled=running or not ready) and make_plan:
        try:
            output = new_output(_results_folder()).resolve()
            measurement = Measurement(make_plan(output), output, state.page_settings().api_key)
        except OSError as error:
            st.error(f"The results can't be written: {error}")
            return
        _measurements().append(measurement)
        st.rerun()
    _draw_where_results_go()


def _results_folder() -> Path:
    """Raises `OSError` if there is none to write into."""
    settings = state.page_settings()
    return folder_for_results(settings.results_dir, settings.own_results_dir)


def _draw_where_results_go() -> None:
    """Only if it isn't the results folder."""
    settings = state.page_settings()
    try:
        folder = _results_folder()
    except OSError:
        return  # said when a measurement is to be started
    if folder == settings.own_results_dir:
        on_host = settings.on_the_host(settings.results_dir)
        st.caption(
            f"The results are saved in {folder}: the page's user ({os.getuid()}) can't write into "
            f"{settings.results_dir}. Quality shows those of both folders. To have them in {on_host}: "
            f"`sudo chown -R {os.getuid()} {on_host}`"
        )


def _draw_questions(contenders: tuple[Contender, ...], questions: Path | None) -> MakePlan | None:
    """Those of this file, or own ones in many orders. None while something is missing."""
    own = {} if questions else _draw_own_questions()
    left, middle, right = st.columns(3)
    number = int(left.number_input("How many", 1, 1000, 12, **state.linked("measure-number")))
    max_tokens = int(middle.number_input("Max tokens", 1, 4096, 32, **state.linked("measure-max-tokens")))
    offer = state.blend_offer()
    policies, ratios = _draw_settings(offer, right)
    if not questions and not own:
        st.caption("Type a question to start.")
    if not ratios or not (questions or (own and _context().chunks)):
        return None
    variants = blend_settings(offer, policies, ratios) if offer and offer.policy else ()
    st.caption(
        f"{'Every question' if questions else 'Every prompt'} goes to all contenders, and to a blend once for each "
        f"policy and share{_duration(contenders, number, len(variants))}. Answers are compared with full prefill's."
    )

    def make_plan(output: Path) -> Plan:
        asked = questions or write_own_questions(output.with_suffix(""), _context(), own, number)
        return QuestionsPlan(
            contenders,
            state.separator(),
            asked.resolve(),
            tuple(policies),
            ratios,
            max_tokens,
            limit=number,
            splitter=state.splitter(),
        )

    return make_plan


def _draw_lengths(contenders: tuple[Contender, ...], sessions: Sequence[ChatSession]) -> MakePlan | None:
    """Contexts of the loaded chunks. None while something is missing."""
    chunks = loaded_chunks()
    num_tokens = sum(len(chunk.text.encode("utf-8", "replace")) for chunk in chunks.values())
    num_tokens //= ESTIMATED_BYTES_PER_TOKEN
    limits = {session.contender: session.server.max_model_len for session in sessions if session.server}
    usual = default_lengths(min((limit for limit in limits.values() if limit), default=None), num_tokens)
    left, middle, right = st.columns(3)
    typed = left.text_input("Context lengths (tokens)", ", ".join(map(str, usual)), **state.linked("measure-lengths"))
    num_repeats = middle.number_input(
        "Repetitions",
        LEAST_PAIRS,
        100,
        DEFAULT_REPEATS,
        **state.linked("measure-repeats"),
        help="Of each length, with the chunks in another order. From six on there is a 95 % interval of the median; "
        "with fewer the whole range stands for it.",
    )
    offer = state.blend_offer()
    policies, ratios = _draw_settings(offer, right)
    if not chunks:
        st.info("There is no chunk that a context could be made of. Put documents into the data folder.")
        return None
    st.caption(
        f"Contexts are made of all {len(chunks):,} loaded chunks, about {num_tokens:,} tokens; longer ones repeat "
        "them. A blend has them in its cache before. Every repetition brings them in another order, so that no prefix "
        "cache answers."
    )
    if not any(contender.name == REFERENCE for contender in contenders):
        st.info(f"Without the contender `{REFERENCE}` there are times, but nothing to compare them with.")
    try:
        lengths = read_lengths(typed, [(contender.title, limit) for contender, limit in limits.items()])
    except ValueError as error:
        st.warning(str(error))
        return None
    if not ratios:
        return None

    def make_plan(output: Path) -> Plan:
        data = state.page_settings().data_dir
        if uploads():
            data = output.with_suffix("")
            write_documents(data, [chunk.text for chunk in chunks.values()])
        tokenizer = state.splitter().tokenizer_file
        return LengthsPlan(
            contenders,
            state.separator(),
            data.resolve(),
            blend_settings(offer, policies, ratios) if offer and offer.policy else (),
            lengths,
            int(num_repeats),
            tokenizer.absolute().parent if tokenizer else None,
        )

    return make_plan


def _draw_settings(
    offer: BlendOffer | None, ratio_place: st.delta_generator.DeltaGenerator
) -> tuple[list[str], tuple[float, ...]]:
    """Policies and ratios: every policy with every ratio."""
    if not offer or not offer.policy:
        return [], (0.0,)
    typed = ratio_place.text_input(
        "Shares to recompute",
        _usual_ratios(offer),
        **state.linked("measure-ratios"),
        help="Of the reused tokens: from 0 (none, fastest) to 1 (all, exact), separated by commas.",
    )
    policies = st.multiselect(
        "Policies",
        offer.policy.choices,
        default=[st.session_state.get(POLICY, offer.policy.default)],
        **state.linked("measure-policies"),
    )
    try:
        ratios = tuple(float(part) for part in typed.split(","))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
        st.warning(f"{typed!r} isn't a list of shares from 0 to 1, separated by commas.")
        return policies, ()
    return policies, ratios


def _context() -> Context:
    """The arena's, even if this page was opened first."""
    begin_arena(state.open_chat())
    chunks = loaded_chunks()
    names: list[str] = st.session_state["order"]
    system = st.session_state.get("system-prompt", state.folder_documents().system)
    return Context(system.strip(), tuple(chunks[name] for name in names if name in chunks), state.separator())


def _draw_own_questions() -> dict[str, str]:
    """Initially those of the chat."""
    num_chunks = len(_context().chunks)
    what = "chunk of the arena" if num_chunks == 1 else f"{num_chunks} chunks of the arena, each time in another order"
    asked = dict.fromkeys(turn.question for turn in state.open_chat().chat.turns)
    typed = st.text_area(
        f"Questions over the {what}",
        "\n".join(asked),
        placeholder="One in each line. After a bar, if you like, what counts as right: Who runs the trams? | Carris",
        **state.linked("measure-own-questions"),
        help="Questions take turns until the number of prompts below is reached. A right answer may follow a bar (|).",
    )
    names = [chunk.name for chunk in _context().chunks]
    folder = state.page_settings().data_dir
    own = read_own_questions(typed, lambda question: gold_answer(folder, question, names))
    if own:
        told = "; ".join(f"{question} {answer}" for question, answer in own.items() if answer)
        st.caption(f"Counts as right: {literal(told)}" if told else "No right answers known; answers are compared.")
    return own


def _duration(contenders: Sequence[Contender], num_prompts: int, num_variants: int) -> str:
    """How many requests that makes, and how long they take at the speed of the chat's last answers."""
    times_ms = {
        answer.contender.name: answer.figures.total_ms
        for turn in state.open_chat().chat.turns
        for answer in turn.answers.values()
        if answer.figures.total_ms is not None
    }
    counts = {one.name: num_prompts * (max(1, num_variants) if one.report == "blend" else 1) for one in contenders}
    told = f": {sum(counts.values()):,} requests"
    if not counts or counts.keys() - times_ms.keys():
        return told
    seconds = sum(count * times_ms[name] for name, count in counts.items()) / 1e3
    return f"{told}, {readable_time(seconds)} at the speed of this chat's answers"


def _usual_ratios(offer: BlendOffer) -> str:
    """0, and the arena's."""
    assert offer.policy, "it blends"
    policy = st.session_state.get(POLICY, offer.policy.default)
    ratios = [one.default for one in offer.parameters_of(policy, within_time=False) if one.name == RATIO]
    own = st.session_state.get(parameter_key(RATIO), ratios[0]) if ratios else USUAL_RATIO
    return ", ".join(dict.fromkeys(["0", f"{float(own):g}"]))


@st.fragment(run_every=POLL_S)
def draw_progress(measurement: Measurement) -> None:
    if not measurement.is_running:
        st.rerun()
    progress = measurement.progress()
    if not measurement.is_stopped:
        st.progress(progress.share, progress.text)
        st.button("Stop", key="measure-stop", on_click=measurement.stop, help="The answers so far are kept.")
        return
    st.progress(progress.share, STOPPING)
    if measurement.may_end:
        st.button(
            "End now", key="measure-end", on_click=measurement.end, help="Answers that aren't saved yet are lost."
        )


def draw_measurement(measurement: Measurement) -> None:
    if measurement.is_running:
        draw_progress(measurement)
    elif measurement.has_result:
        if problem := measurement.problem():
            st.warning(f"The run ended early, with {problem!r}: not all of it was measured.")
        draw_result(measurement)
    elif problem := measurement.problem():
        st.error(problem)
    else:
        st.info(NOT_SAVED if measurement.is_ended else NO_FIGURES)
    with st.expander("The same from a terminal"):
        draw_command(measurement)


def draw_command(measurement: Measurement) -> None:
    settings, output = state.page_settings(), measurement.output
    written = output.with_suffix("")
    if settings.host_folders and written.is_dir() and written.is_relative_to(settings.own_results_dir):
        st.caption("What was asked is in the page's container. This copies it:")
        on_host = settings.on_the_host(written)
        st.code(f"mkdir -p {on_host.parent} && docker cp {CONTAINER}:{written} {on_host}", language="sh")
    if settings.host_folders:
        st.caption("In the project's folder on the host:")
    st.code(measurement.plan.command(output, settings.on_the_host), language="sh", wrap_lines=True)


def draw_result(measurement: Measurement) -> None:
    path = measurement.output
    text = path.read_text(encoding="utf-8")
    try:
        result = read_result(text)
    except ValueError as error:
        if measurement.is_stopped:
            st.info(NOT_SAVED if measurement.is_ended else NO_FIGURES)
        else:
            st.error(f"{path.name} can't be read as a result: {error}")
        return
    st.caption(_title(measurement))
    with st.container(horizontal=True):
        if st.button("Open in Quality", key="open-in-quality"):
            choose_file(path)
            st.switch_page("views/quality.py", query_params={})  # without it Streamlit refuses to drop the widgets' own
        st.download_button("Download the JSON", text, path.name, "application/json", key="measure-download")
    draw = draw_lengths if result["settings"]["benchmark"] == TTFT else draw_questions
    draw(result)


def _title(measurement: Measurement) -> str:
    """Which run it was: the choices above may have changed."""
    plan, written = measurement.plan, measurement.output.with_suffix("")
    if isinstance(plan, QuestionsPlan):
        what = OWN if plan.questions.is_relative_to(written) else QUESTIONS
        parts = [", ".join(plan.policies), "shares " + ", ".join(f"{ratio:g}" for ratio in plan.ratios)]
        asked = " · ".join([what, *(parts if plan.policies else [])])
    else:
        asked = LENGTHS
    return f"Last run: {asked} · {measurement.output.name}"


def draw_questions(found: Mapping[str, Any]) -> None:
    result = read_eval(found)
    if result.settings.get("is_interrupted"):
        st.warning("Stopped: the figures are of the questions until then.")
    if note := cached_note(result):
        st.caption(note)
    if records := times(result):
        st.markdown("**Time to first token, every answer**")
        draw_chart(ttft_chart(records))
    draw_panels(measured_panels(found))
    _draw_table(measured_table(result), shares=("Agreement", "Right"))


def draw_lengths(result: Mapping[str, Any]) -> None:
    if result["settings"].get("is_interrupted"):
        st.warning("Stopped: the figures are of the lengths and repetitions until then.")
    for failure in failures(result):
        st.warning(failure)
    if verdicts := length_verdicts(result):
        st.html(verdicts_html(verdicts))
    draw_panels(ttft_panels(result, colours_in([result])))
    _draw_table(lengths_table(result), shares=("Reused", "Recomputed"))


def _draw_table(records: Sequence[Mapping[str, Any]], shares: Sequence[str]) -> None:
    columns = {name: st.column_config.NumberColumn(format="percent") for name in shares}
    columns |= {
        name: st.column_config.NumberColumn(f"{name} (ms)", format="localized") for name in ("TTFT median", "TTFT p95")
    }
    columns |= {name: st.column_config.NumberColumn(format="%.2fx", help=text) for name, text in SPEEDUP_HELP.items()}
    columns["Context"] = st.column_config.NumberColumn(format="localized", help="Tokens of the chunks")
    st.dataframe(pd.DataFrame(records), hide_index=True, column_config=columns, placeholder="–", key="measured-figures")


main()
