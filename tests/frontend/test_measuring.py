"""A run over many questions or over context lengths: its command, its orders of chunks, its progress, its end and its
page, with the real command.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from typer.main import get_command

from chat import Context
from contender_api import BlendOffer
from kvarena.bench.prompts import LEAST_CHUNK_TOKENS, Workload
from kvarena.bench.quality.questions import load_questions, stack_splitter
from kvarena.cli import app as command_line
from kvarena.documents import TextChunk, load_chunks
from kvarena.splitting import find_splitter
from measuring import (
    LEAST_LENGTH,
    ROOM_TOKENS,
    LengthsPlan,
    Measurement,
    QuestionsPlan,
    blend_settings,
    default_lengths,
    folder_for_results,
    orders,
    read_lengths,
    read_own_questions,
    readable_time,
    write_own_questions,
)
from settings import Contender, Settings
from support.small_openai_server import OFFER, REPORT, SmallServer, StartServer, report_of
from support.tiny_models import tiny_tokenizer

APP = Path(__file__).resolve().parents[2] / "frontend" / "app.py"
OpenMeasure = Callable[..., AppTest]
BLEND_REPORT = REPORT | {"store_hits": 2, "store_misses": 0, "blend_ms": 1.0}
CONTEXT = Context("Be brief.", tuple(TextChunk(name, f"This is {name}.") for name in ("a", "b", "c")), " # ")


def test_orders_are_different_and_no_more_than_there_are() -> None:
    assert orders(["a"], 5) == [["a"]]
    assert len({tuple(order) for order in orders(list("abc"), 100)}) == 6
    many = orders([f"{number}" for number in range(12)], 40)
    assert len({tuple(order) for order in many}) == len(many) == 40
    assert orders(list("abcd"), 24)[-1] == list("abcd"), "a chat may have asked in the given one"
    assert list("abcd") not in orders(list("abcd"), 23)
    assert [f"{number}" for number in range(12)] not in many


def test_the_command_can_read_the_shuffles_that_were_written(tmp_path: Path) -> None:
    path = write_own_questions(tmp_path / "run", CONTEXT, {"Who?": "Ann"}, 4)
    read = load_questions(path)
    assert read.system == "Be brief."
    assert [question.answers for question in read.questions] == [("Ann",)] * 4
    contexts = [[chunk.text for chunk in question.chunks] for question in read.questions]
    assert len({tuple(texts) for texts in contexts}) == 4
    assert all(sorted(texts) == sorted(CONTEXT.texts) for texts in contexts)


def test_own_questions_take_turns_and_the_orders_change_with_every_round(tmp_path: Path) -> None:
    asked = {"Who?": "Ann", "Where?": ""}
    read = load_questions(write_own_questions(tmp_path / "run", CONTEXT, asked, 5))
    assert [(question.question, question.answers) for question in read.questions] == [
        ("Who?", ("Ann",)),
        ("Where?", ()),
        ("Who?", ("Ann",)),
        ("Where?", ()),
        ("Who?", ("Ann",)),
    ]
    orders = [tuple(chunk.text for chunk in question.chunks) for question in read.questions]
    assert len(set(orders)) == 5, "none has the beginning of another in its cache"
    few = replace(CONTEXT, chunks=CONTEXT.chunks[:2])
    read = load_questions(write_own_questions(tmp_path / "few", few, asked, 9))
    prompts = {(question.question, tuple(chunk.text for chunk in question.chunks)) for question in read.questions}
    assert len(prompts) == len(read.questions) == 4, "two orders of each question, and none twice"


def test_what_counts_as_right_follows_a_bar_or_is_known() -> None:
    text = " Who? | Ann \n\nWhere?\nWho?|Ben\n| nothing\nWhen?|"
    own = read_own_questions(text, lambda question: {"Where?": "Inver"}.get(question, ""))
    assert list(own.items()) == [("Who?", "Ann"), ("Where?", "Inver"), ("When?", "")]


@pytest.mark.parametrize(
    ("seconds", "told"), [(4.4, "about 4 s"), (89.4, "about 89 s"), (100, "about 2 min"), (4000, "about 67 min")]
)
def test_a_time_that_a_person_reads(seconds: float, told: str) -> None:
    assert readable_time(seconds) == told


def test_the_shown_command_is_the_one_that_runs(tmp_path: Path) -> None:
    plain = Contender("plain", "Plain", "http://127.0.0.1:9")
    plan = QuestionsPlan((plain,), "<note> ", tmp_path / "my questions.jsonl", ("none",), (0.0, 0.15), 9, limit=3)
    command = plan.command(tmp_path / "out.json")
    assert shlex.split(command)[1:] == plan.arguments(tmp_path / "out.json")
    assert "--separator '<note> '" in command
    assert "--ratio 0,0.15" in command


def test_the_shown_command_is_for_the_host_where_the_page_runs_in_a_container() -> None:
    plain = Contender("plain", "Plain", "http://plain:8001", public_url="http://127.0.0.1:9001")
    settings = Settings(host_folders={Path("/kvarena/data"): Path("my notes"), Path("/kvarena/results"): Path("/out")})
    plan = QuestionsPlan((plain,), " # # ", Path("/kvarena/data/questions.jsonl"), (), (), 9)
    output = Path("/kvarena/results/run-1.json")
    words = shlex.split(plan.command(output, settings.on_the_host))
    assert words[:4] == [".venv/bin/kvarena", "eval", "--questions", "my notes/questions.jsonl"]
    assert words[words.index("--output") + 1] == "/out/run-1.json"
    assert words[words.index("--contender") + 1] == "plain=http://127.0.0.1:9001"
    assert "plain=http://plain:8001" in plan.arguments(output), "what runs here"


def test_the_command_cuts_documents_as_the_page_does(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    splitter = find_splitter(str(tmp_path / "model"), 64)
    (tmp_path / "long.txt").write_text("The lamp is old. " * 200)
    names = [chunk.name for chunk in load_chunks(tmp_path, splitter)]
    assert len(names) > 2
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "Who?", "answers": ["Ann"], "chunks": names[::-1]}))
    words = QuestionsPlan((), " # # ", questions, (), (), 9, splitter=splitter).arguments(tmp_path / "out.json")
    given = get_command(command_line).commands["eval"].make_context("eval", words[1:]).params  # type: ignore[attr-defined]
    read = load_questions(questions, splitter=stack_splitter(given["chunk_tokens"], given["tokenizer"]))
    assert [chunk.name for chunk in read.questions[0].chunks] == names[::-1]


def test_results_go_where_the_page_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, own = tmp_path / "results", tmp_path / "home" / "results"
    assert folder_for_results(wanted, own) == wanted
    assert not own.exists()
    (tmp_path / "file").write_text("")
    assert folder_for_results(tmp_path / "file" / "results", own) == own, "it can't be made"
    monkeypatch.setattr("measuring.os.access", lambda folder, mode: folder != wanted)
    assert folder_for_results(wanted, own) == own, "another user's"
    assert own.is_dir()


def lengths_plan(tmp_path: Path, *contenders: Contender) -> LengthsPlan:
    settings = ("kv_deviation:0", "kv_deviation:0.15", "none")
    return LengthsPlan(contenders, " # # ", tmp_path / "my texts", settings, (512, 2000), 6, tmp_path / "model")


def test_the_command_over_context_lengths_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    plain, blend = Contender("plain", "Plain", "http://127.0.0.1:9"), Contender("blend", "Blend", "http://127.0.0.1:8")
    plan = lengths_plan(tmp_path, plain, blend)
    command = shlex.split(plan.command(tmp_path / "out.json"))
    assert command[1:] == plan.arguments(tmp_path / "out.json")
    assert command[1:3] == ["bench", "ttft"]
    ttft = get_command(command_line).commands["bench"].commands["ttft"]  # type: ignore[attr-defined]
    given = ttft.make_context("ttft", command[3:]).params
    assert list(given["target"]) == ["plain=http://127.0.0.1:9", "blend=http://127.0.0.1:8"]
    assert list(given["policy"]) == ["kv_deviation:0", "kv_deviation:0.15", "none"]
    assert (given["context_tokens"], given["repeats"], given["state"]) == ("512,2000", 6, "warm")
    assert (given["data"], given["separator"]) == (tmp_path / "my texts", " # # ")


def test_every_policy_is_measured_with_every_ratio_where_it_has_one() -> None:
    offer = BlendOffer.read(OFFER)
    assert blend_settings(offer, ["kv_deviation", "none"], [0, 0.15]) == ("kv_deviation:0", "kv_deviation:0.15", "none")
    assert blend_settings(offer, [], [0.15]) == ("kv_deviation:0.15",), "the server's own"
    assert blend_settings(offer, ["chunk_head"], [0.05, 0.05]) == ("chunk_head:0.05",)


@pytest.mark.parametrize(
    ("limit", "num_document_tokens", "lengths"),
    [
        (None, 0, [512, 1000, 2000, 4000]),
        (4096, 50_000, [512, 1000, 2000, 4000]),
        (2048, 0, [512, 1000]),
        (131_072, 20_000, [512, 1000, 2000, 4000, 8000, 16_000]),
        (131_072, 3000, [512, 1000, 2000, 4000]),
        (512, 0, [106, 213, 427]),
        (64, 0, [LEAST_LENGTH]),
    ],
)
def test_the_lengths_offered_fit_and_go_as_far_as_the_documents(
    limit: int | None, num_document_tokens: int, lengths: list[int]
) -> None:
    assert default_lengths(limit, num_document_tokens) == lengths


def test_lengths_are_read_in_order_and_each_once() -> None:
    assert read_lengths("2000, 512,512 ,1_000", [("Plain", 4096), ("Blend", None)]) == (512, 1000, 2000)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("many", "'many' isn't a list of lengths in tokens, separated by commas."),
        ("", "'' isn't a list"),
        ("512,,1000", "isn't a list"),
        ("512.5", "isn't a list"),
        ("15, 512", "A context has at least 16 tokens, not 15."),
        ("-5", "A context has at least 16 tokens, not -5."),
        (
            "512, 4012",
            "4,012 tokens are too many for Plain: it takes 4,096 with the question and the answer in them, so a",
        ),
    ],
)
def test_lengths_that_cannot_be_measured_are_explained(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        read_lengths(text, [("Blend", None), ("Plain", 4096)])


def test_the_page_knows_what_the_benchmark_needs_beside_a_context() -> None:
    workload = Workload(context_tokens=(4000,), max_new_tokens=1)
    assert workload.longest_tokens == 4000 + ROOM_TOKENS
    assert LEAST_LENGTH == LEAST_CHUNK_TOKENS


def ended(run: Measurement, timeout_s: float = 200.0) -> Measurement:
    deadline_s = time.monotonic() + timeout_s
    while run.is_running:
        assert time.monotonic() < deadline_s, run.progress()
        time.sleep(0.1)
    return run


@pytest.mark.timeout(400)
def test_a_run_that_cannot_start_says_why(tmp_path: Path) -> None:
    path = write_own_questions(tmp_path / "run", CONTEXT, {"Who?": "Ann"}, 4)
    plain = Contender("plain", "Plain", "http://127.0.0.1:9")
    run = ended(Measurement(QuestionsPlan((plain,), " # ", path, (), (), 9), tmp_path / "out.json"))
    assert "http://127.0.0.1:9" in run.problem()


@pytest.mark.timeout(400)
def test_a_run_shows_its_progress_and_keeps_what_was_answered_when_it_is_stopped(
    small_server: StartServer, tmp_path: Path
) -> None:
    """While an answer of the other server is under way."""
    path = write_own_questions(tmp_path / "run", CONTEXT, {"Who?": "Hello"}, 6)
    plain = Contender("plain", "Plain", small_server().url)
    other = Contender("other", "Other", small_server(hold_after=1).url)
    run = Measurement(QuestionsPlan((plain, other), " # ", path, (), (), 9), tmp_path / "out.json")
    deadline_s = time.monotonic() + 200
    while run.progress().share == 0 and run.is_running:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert run.progress().text.startswith("asking: "), run.problem()
    run.stop()
    ended(run)
    assert run.output.is_file(), run.problem()
    assert '"is_interrupted": true' in run.output.read_text()


@pytest.fixture
def open_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenMeasure:
    """The page over these servers, the first of which is plain, and three short documents."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for chunk in CONTEXT.chunks:
        (tmp_path / "data" / f"{chunk.name}.txt").write_text(chunk.text)
    monkeypatch.setenv("KVARENA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("KVARENA_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("KVARENA_TOKENIZER", str(tmp_path / "model"))

    def open_over(*servers: SmallServer) -> AppTest:
        entries = [
            {"name": name, "title": name.capitalize(), "url": server.url, "report": report_of(server)}
            for name, server in zip(("plain", "blend"), servers, strict=False)
        ]
        monkeypatch.setenv("KVARENA_CONTENDERS", json.dumps(entries))
        st.cache_resource.clear()
        st.cache_data.clear()
        page = AppTest.from_file(str(APP), default_timeout=60).run().switch_page("views/measure.py").run()
        assert not page.exception, page.exception
        assert not page.markdown, "Streamlit draws a string that stands alone in the script"
        return page

    return open_over


def measured(page: AppTest) -> AppTest:
    """Waits until the result is drawn."""
    deadline_s = time.monotonic() + 200
    while not [button for button in page.button if button.key == "open-in-quality"]:
        assert time.monotonic() < deadline_s, [error.value for error in page.error]
        assert not page.error, [error.value for error in page.error]
        time.sleep(0.5)
        page.run()
    assert not page.exception, page.exception
    return page


def texts_of(prompts: list[list[int]]) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(prompt) for prompt in prompts]


@pytest.mark.timeout(400)
def test_the_page_measures_shuffles_of_a_question_and_draws_the_result(
    small_server: StartServer, open_measure: OpenMeasure
) -> None:
    server = small_server()
    page = open_measure(server)
    assert "questions.jsonl" in page.info[0].value, "the folder has none, so shuffles are what is left"
    assert page.button_group(key="measure-what-2").options == ["My own questions", "Context lengths"]
    assert page.button(key="measure-start").disabled, "without a question"
    page.text_area(key="measure-own-questions").set_value("Who?").run()
    page.number_input(key="measure-number").set_value(4).run()
    page.button(key="measure-start").click().run()
    measured(page)
    assert len(page.get("vega_lite_chart")) == 1
    (figures,) = page.dataframe
    assert list(figures.value["Questions"]) == [4]
    assert list(figures.value["Failed"]) == [0]
    assert figures.value["Right"].isna().all(), "no right answer was given"
    asked = {request["messages"][0]["content"] for request in server.completions()}
    assert len(asked) == 4, "each in another order"
    page.switch_page("views/arena.py").run()
    page.switch_page("views/measure.py").run()
    assert page.number_input(key="measure-number").value == 4, "kept while another page was looked at"
    assert page.text_area(key="measure-own-questions").value == "Who?"


@pytest.mark.timeout(400)
def test_results_that_the_page_keeps_itself_are_opened_in_quality(
    small_server: StartServer, open_measure: OpenMeasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where the folder of the results is another user's."""
    own = tmp_path / "home" / "results"
    monkeypatch.setenv("KVARENA_HOME", str(own.parent))
    monkeypatch.setenv("KVARENA_HOST_FOLDERS", json.dumps({str(own): "results", str(tmp_path / "results"): "results"}))
    (tmp_path / "results").write_text("in the way")
    page = open_measure(small_server())
    said = [caption.value for caption in page.caption if caption.value.startswith("The results are saved in ")]
    assert [str(own) in text and "sudo chown" in text for text in said] == [True]
    page.text_area(key="measure-own-questions").set_value("Who?").run()
    page.number_input(key="measure-number").set_value(2).run()
    page.button(key="measure-start").click().run()
    measured(page)
    (result,) = own.glob("run-*.json")
    copy, command = (code.value for code in page.code)
    assert copy == f"mkdir -p results && docker cp kvarena-page:{result.with_suffix('')} results/{result.stem}"
    assert f"--questions results/{result.stem}/questions.jsonl" in command
    page.button(key="open-in-quality").click().run()
    page.switch_page("views/quality.py").run()
    assert not page.exception, page.exception
    assert page.selectbox(key="result-file").value == f"page/{result.name}"


@pytest.mark.timeout(400)
def test_the_page_measures_context_lengths_and_says_from_which_one_it_pays(
    small_server: StartServer, open_measure: OpenMeasure
) -> None:
    plain, blend = small_server(), small_server(offer=OFFER, report=BLEND_REPORT)
    page = open_measure(plain, blend)
    page.button_group(key="measure-what-2").set_value("Context lengths").run()
    assert page.text_input(key="measure-lengths").value == "512, 1000, 2000, 4000", "all fit into 4,096"
    page.text_input(key="measure-lengths").set_value("300, 4050").run()
    assert "4,050 tokens are too many for Plain" in page.warning[0].value
    assert page.button(key="measure-start").disabled
    page.text_input(key="measure-lengths").set_value("600, 300").run()
    page.number_input(key="measure-repeats").set_value(3).run()
    page.text_input(key="measure-ratios").set_value("0.15").run()
    assert not page.warning
    page.button(key="measure-start").click().run()
    measured(page)
    assert len(page.get("vega_lite_chart")) == 2, "times, and speedups over plain"
    (figures,) = page.dataframe
    assert list(figures.value["Context"]) == [300, 300, 600, 600]
    assert list(figures.value["Asked"]) == [3] * 4
    assert list(figures.value["Failed"]) == [0] * 4
    assert list(figures.value["Variant"]) == ["plain", "blend kv_deviation 15 %"] * 2
    (said,) = [block.proto.body for block in page.get("html") if 'data-testid="length-verdict"' in block.proto.body]
    assert "blend kv_deviation 15 %: " in said
    asked = texts_of(plain.prompts())
    assert len(asked) == len(set(asked)) == 2 * (1 + 3), "a warm-up of each length; no prompt twice"
    assert len(set(asked) & set(texts_of(blend.prompts()))) == 2 * 3, "the same ones, but for warm-ups"
    assert len(blend.prompts()) == len(asked) + 2, "the chunks of each length once before"
    assert all("This is a" in text and "This is c" in text and text.count(" <sep> ") > 1 for text in asked)
    page.switch_page("views/arena.py").run()
    page.switch_page("views/measure.py").run()
    assert page.button_group(key="measure-what-2").value == "Context lengths", "kept while another page was looked at"
    assert page.text_input(key="measure-lengths").value == "600, 300"
    assert page.number_input(key="measure-repeats").value == 3


@pytest.mark.timeout(400)
def test_a_contender_that_fails_is_named_beside_the_figures_of_the_others(
    small_server: StartServer, open_measure: OpenMeasure
) -> None:
    blend = small_server(offer=OFFER, report=BLEND_REPORT, error=(500, "out of memory"))
    page = open_measure(small_server(), blend)
    page.button_group(key="measure-what-2").set_value("Context lengths").run()
    page.text_input(key="measure-lengths").set_value("300").run()
    page.number_input(key="measure-repeats").set_value(3).run()
    page.text_input(key="measure-ratios").set_value("0.15").run()
    page.button(key="measure-start").click().run()
    measured(page)
    assert "blend kv_deviation 15 %: 3 of 3 requests failed, the first with" in page.warning[0].value
    assert "out of memory" in page.warning[0].value
    assert list(page.dataframe[0].value["Failed"]) == [0, 3]


def test_a_comma_inside_a_number_is_no_separator() -> None:
    for text in ("16,384", "500, 1,024", "8,192,16,384", "131,072"):
        with pytest.raises(ValueError, match="without a comma inside a number"):
            read_lengths(text, [])
    assert read_lengths("512,768, 1000,2000", []) == (512, 768, 1000, 2000)


def test_stopping_shows_and_can_be_ended_where_it_takes_long(
    small_server: StartServer, open_measure: OpenMeasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a server doesn't answer: the command then is one that Ctrl-C doesn't end."""
    page = open_measure(small_server())
    command = tmp_path / "kvarena"
    command.write_text("#!/bin/sh\ntrap '' INT\necho asking: 1/4\nexec sleep 300\n")
    command.chmod(0o755)
    monkeypatch.setattr("measuring.sys.executable", str(tmp_path / "python"))
    page.text_area(key="measure-own-questions").set_value("Who?").run()
    page.button(key="measure-start").click().run()
    shown_until(page, "asking: 1 of 4")
    page.button(key="measure-stop").click().run()
    shown_until(page, "Stopping: saving what was answered")
    assert not {"measure-stop", "measure-end"} & {button.key for button in page.button}
    monkeypatch.setattr("measuring.END_AFTER_S", 0.0)
    page.run()
    page.button(key="measure-end").click().run()
    shown_until(page, "Ended before the answers were saved: there are no figures.")
    assert not page.button(key="measure-start").disabled


def shown_until(page: AppTest, text: str) -> None:
    deadline_s = time.monotonic() + 60
    while text not in [*(one.value for one in page.info), *(one.proto.text for one in page.get("progress"))]:
        assert time.monotonic() < deadline_s, [*page.info, *page.get("progress")]
        page.run()
