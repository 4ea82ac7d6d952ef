"""The whole page in Streamlit's own test runner, over small servers: it sees the settled page, no stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from support.small_openai_server import OFFER, SIMLLM_OFFER, SIMLLM_REPORT, SmallServer, StartServer, report_of

APP = Path(__file__).resolve().parents[2] / "frontend" / "app.py"
Open = Callable[..., AppTest]


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Open:
    """A page over these servers, named blend and plain, and the chunks `one`, `two`, `three`."""
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"This is {name}.")
    (tmp_path / "sys_prompt.txt").write_text("Be brief.")

    def page(*servers: SmallServer) -> AppTest:
        contenders = [
            {"name": name, "title": name.title(), "url": server.url, "report": report_of(server)}
            for name, server in zip(("blend", "plain"), servers, strict=True)
        ]
        monkeypatch.setenv("KVARENA_CONTENDERS", json.dumps(contenders))
        monkeypatch.setenv("KVARENA_DATA_DIR", str(tmp_path))
        st.cache_resource.clear()
        st.cache_data.clear()
        return AppTest.from_file(str(APP), default_timeout=20).run()

    return page


def html(page: AppTest) -> str:
    assert not page.exception, page.exception
    return "\n".join(element.proto.body for element in page.get("html"))


def test_page_shows_servers_context_and_its_tokens(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    body = html(page)
    assert all(f'data-testid="server-{name}" data-state="up"' in body for name in ("blend", "plain"))
    assert body.count('data-testid="chunk"') == 3
    assert page.selectbox(key="policy").options == OFFER["policies"]
    assert page.slider(key="policy-ratio").value == 0.15
    assert page.expander[0].label == "Context: 3 chunks, 18 tokens"


def test_a_time_in_place_of_the_ratio(small_server: StartServer, open_page: Open) -> None:
    """It is offered for policies that go by a ratio, and by servers that know of it."""
    blend = small_server(offer=OFFER | {"timed_policies": ["kv_deviation"]})
    page = open_page(blend, small_server())
    assert page.slider(key="policy-ratio").value == 0.15
    page.toggle(key="has-max-ttft").set_value(True).run()
    assert not [slider for slider in page.slider if slider.key == "policy-ratio"]
    page.number_input(key="max-ttft-ms").set_value(250.0).run()
    page.chat_input[0].set_value("Who?").run()
    (asked,) = blend.completions()
    chosen = asked["kv_transfer_params"]["kvarena"]
    assert (chosen["policy"], chosen["max_ttft_ms"]) == ("kv_deviation", 250.0)
    assert "ratio" not in chosen
    page.selectbox(key="policy").set_value("random").run()
    assert page.slider(key="policy-ratio").value == 0.15
    assert "has-max-ttft" not in {toggle.key for toggle in page.toggle}


def test_a_policy_has_the_controls_that_the_server_describes(small_server: StartServer, open_page: Open) -> None:
    """Also those of a policy that nobody here knows."""
    drift = {"type": "number", "at_least": 0, "at_most": 5, "default": 2.5, "help": "How far.", "policies": ["mine"]}
    names = ["kv_deviation", "none", "mine"]
    parameters = {**OFFER["parameters"], "drift": drift}
    parameters["policy"] = {**parameters["policy"], "choices": names, "policies": names}
    blend = small_server(offer=OFFER | {"policies": names, "parameters": parameters})
    page = open_page(blend, small_server())
    assert page.number_input(key="policy-check_layer").value == 2, "the server's default"
    assert page.number_input(key="policy-num_filters").label == "Num filters"
    assert page.number_input(key="policy-run_tokens").max == 1024
    page.selectbox(key="policy-deviation").set_value("values").run()
    page.number_input(key="policy-num_filters").set_value(3).run()
    page.chat_input[0].set_value("Who?").run()
    (asked,) = blend.completions()
    assert asked["kv_transfer_params"]["kvarena"] == {
        "policy": "kv_deviation", "ratio": 0.15, "check_layer": 2, "deviation": "values", "num_filters": 3,
        "run_tokens": 1,
    }  # fmt: skip
    page.selectbox(key="policy").set_value("mine").run()
    assert [slider.key for slider in page.slider] == ["policy-drift", "temperature"]
    assert (page.slider(key="policy-drift").value, page.slider(key="policy-drift").help) == (2.5, "How far.")
    page.selectbox(key="policy").set_value("none").run()
    assert [slider.key for slider in page.slider] == ["temperature"]


def test_question_goes_to_both_with_the_choices_on_the_page(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    page.multiselect(key="chunks").set_value(["two", "one"]).run()
    page.selectbox(key="policy").set_value("none").run()
    page.number_input(key="max-tokens").set_value(9).run()
    page.chat_input[0].set_value("Who?").run()

    body = html(page)
    for name in ("blend", "plain"):
        assert f'data-testid="pane-{name}" data-state="done"' in body
    assert "Hello, world" in body
    assert 'data-testid="speed-up"' in body
    (to_blend,), (to_plain,) = blend.completions(), plain.completions()
    assert to_blend["messages"] == to_plain["messages"]
    separator = OFFER["separator"]
    assert to_blend["messages"][1]["content"] == f"{separator}This is one.{separator}This is two.{separator}Who?"
    assert to_blend["kv_transfer_params"]["kvarena"]["policy"] == "none"
    assert to_blend["max_tokens"] == to_plain["max_tokens"] == 9


def test_simllm_has_knobs_of_its_own_and_shows_the_earlier_prompt(small_server: StartServer, open_page: Open) -> None:
    simllm, plain = small_server(offer=SIMLLM_OFFER, report=SIMLLM_REPORT), small_server()
    page = open_page(simllm, plain)
    assert not [box.key for box in page.selectbox if box.key == "policy"], "nobody blends"
    assert page.selectbox(key="mode").options == SIMLLM_OFFER["modes"]
    assert page.number_input(key="similarity-threshold").value == 0.998
    page.selectbox(key="mode").set_value("top_layer").run()
    page.number_input(key="similarity-threshold").set_value(0.9).run()
    page.chat_input[0].set_value("Who?").run()
    body = html(page)
    assert body.count('data-testid="similar-task"') == 1
    assert "Bruno plays the" in body
    (asked,) = simllm.completions()
    assert asked["kv_transfer_params"]["kvarena"] == {"mode": "top_layer", "similarity_threshold": 0.9}
    assert "kv_transfer_params" not in plain.completions()[0]


def test_a_server_that_finds_its_own_threshold_is_sent_none(small_server: StartServer, open_page: Open) -> None:
    auto = SIMLLM_OFFER | {"defaults": {"reuse": True, "mode": "aligned", "similarity_threshold": "auto"}}
    simllm = small_server(offer=auto, report=SIMLLM_REPORT)
    page = open_page(simllm, small_server())
    assert [field.key for field in page.number_input] == ["max-tokens"]
    page.chat_input[0].set_value("Who?").run()
    assert simllm.completions()[0]["kv_transfer_params"]["kvarena"] == {"mode": "aligned"}


def test_without_simllm_its_knobs_are_not_there(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    assert not {"mode", "similarity-threshold"}.intersection(w.key for w in (*page.selectbox, *page.number_input))


def test_the_separator_is_the_stacks_where_nobody_says_another(
    small_server: StartServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_SEPARATOR", "<note>")
    plain = small_server()
    page = open_page(small_server(offer=SIMLLM_OFFER, report=SIMLLM_REPORT), plain)
    page.chat_input[0].set_value("Who?").run()
    assert plain.completions()[0]["messages"][1]["content"].startswith("<note>This is one.<note>")


def test_follow_up_and_changed_context(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    for question in ("First?", "Second?"):
        page.chat_input[0].set_value(question).run()
    assert [message["role"] for message in plain.completions()[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    page.text_area(key="system-prompt").set_value("Be long.").run()
    assert any("starts a new conversation" in caption.value for caption in page.caption)
    page.chat_input[0].set_value("Third?").run()
    assert len(plain.completions()[2]["messages"]) == 2
    assert html(page).count('data-testid="divider"') == 2


def test_a_server_that_is_down_has_its_error_in_its_pane(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    plain.stop()
    page.chat_input[0].set_value("Who?").run()
    body = html(page)
    assert 'data-testid="pane-blend" data-state="done"' in body
    assert 'data-testid="pane-plain" data-state="failed"' in body
    assert "Nothing answers" in body


def test_only_the_chosen_contender_is_asked(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    page.checkbox(key="run-blend").uncheck().run()
    page.chat_input[0].set_value("Who?").run()
    assert not blend.completions()
    assert len(plain.completions()) == 1
    page.checkbox(key="run-plain").uncheck().run()
    assert page.chat_input[0].disabled


def test_reloaded_page_finds_its_chat(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    page.multiselect(key="chunks").set_value(["two"]).run()
    page.chat_input[0].set_value("Who?").run()
    again = AppTest.from_file(str(APP), default_timeout=20)
    again.query_params["chat"] = page.query_params["chat"]
    again.run()
    assert "Who?" in html(again)
    assert again.multiselect(key="chunks").value == ["two"]
    again.button(key="new-chat").click().run()
    assert "Who?" not in html(again)


def test_the_arena_is_as_it_was_after_a_look_at_another_page(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    page.multiselect(key="chunks").set_value(["three", "one"]).run()
    page.slider(key="policy-ratio").set_value(0.4).run()
    page.text_area(key="system-prompt").set_value("Be long.").run()
    page.checkbox(key="run-plain").uncheck().run()
    page.chat_input[0].set_value("Who?").run()
    page.switch_page("views/quality.py").run()
    assert "Who?" not in html(page)
    page.query_params.clear()
    page.switch_page("views/arena.py").run()
    assert "Who?" in html(page)
    assert page.multiselect(key="chunks").value == ["three", "one"]
    assert page.slider(key="policy-ratio").value == 0.4
    assert page.text_area(key="system-prompt").value == "Be long."
    assert not page.checkbox(key="run-plain").value


@pytest.mark.parametrize("name", ["two.txt", "sys_prompt.txt"])
def test_a_file_in_another_encoding_is_named_beside_the_others_until_it_is_mended(
    small_server: StartServer, open_page: Open, tmp_path: Path, name: str
) -> None:
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text("Über den Fluss", encoding="latin-1")
    page = open_page(small_server(offer=OFFER), small_server())
    body = html(page)
    assert "1 file can't be used" in body.replace("&#x27;", "'")
    assert f"<b>{name}</b> not UTF-8 (byte 0)" in body
    assert not page.error
    assert {"one", "three"} <= set(page.multiselect(key="chunks").value)
    page.chat_input[0].set_value("Who?").run()
    assert 'data-testid="pane-blend" data-state="done"' in html(page)
    (tmp_path / name).write_text(text)
    st.cache_data.clear()
    page.run()
    assert "be used" not in html(page)
    assert page.multiselect(key="chunks").options == ["one", "three", "two"]


def test_a_long_document_of_the_folder_is_in_numbered_chunks_of_the_settings_size(
    small_server: StartServer, open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manual.md").write_text("\n\n".join(f"# Part {n}\n\n{'A sentence on it. ' * 12}" for n in range(3)))
    monkeypatch.setenv("KVARENA_CHUNK_TOKENS", "64")
    page = open_page(small_server(offer=OFFER), small_server())
    assert page.multiselect(key="chunks").options == ["manual 01", "manual 02", "manual 03", "one", "three", "two"]
    assert any("estimated at 4 bytes a token" in caption.value for caption in page.caption)


LONG = " ".join(f"Sentence {number} is about the sea." for number in range(200))


def drop(page: AppTest, *files: tuple[str, bytes]) -> None:
    page.file_uploader[0].set_value([(name, data, "") for name, data in files]).run()
    deadline_s = time.monotonic() + 20
    while 'data-state="filling"' in html(page) and time.monotonic() < deadline_s:
        time.sleep(0.1)
        page.run()


def test_dropped_documents_are_split_filled_picked_and_removed(small_server: StartServer, open_page: Open) -> None:
    blend = small_server(offer=OFFER)
    page = open_page(blend, small_server())
    drop(page, ("one.txt", LONG.encode()), ("scan.pdf", b"no pdf"), ("a.docx", b"PK"))
    body = html(page)
    assert 'data-document="one.txt" data-state="filled"' in body
    assert 'data-document="scan.pdf" data-state="problem"' in body
    assert 'data-document="a.docx" data-state="problem"><b>a.docx</b><small>not a .txt, .md or .pdf file<' in body
    options = page.multiselect(key="chunks").options
    own = [name for name in options if name.startswith("one.txt ")]
    assert own == [f"one.txt {number:02}" for number in range(1, len(own) + 1)], "the folder has a chunk one"
    filled = [body for path, body, _ in blend.requests if path == "/v1/completions"]
    separator = OFFER["separator"]
    assert " ".join(sorted(body["prompt"] for body in filled)).count(separator) == 2 * len(own)
    assert {body["max_tokens"] for body in filled} == {1}

    next(button for button in page.button if button.label == "Pick").click().run()
    assert page.multiselect(key="chunks").value == own
    page.chat_input[0].set_value("Who?").run()
    assert "Sentence 199" in blend.completions()[0]["messages"][1]["content"]
    next(button for button in page.button if button.label == "Remove").click().run()
    assert page.multiselect(key="chunks").options == ["one", "three", "two"]
    assert page.multiselect(key="chunks").value == []


def test_a_filling_that_fails_is_shown_and_can_be_tried_again(small_server: StartServer, open_page: Open) -> None:
    blend = small_server(offer=OFFER)
    blend.error = (400, "too many tokens")
    page = open_page(blend, small_server())
    drop(page, ("notes.md", b"# Notes\n\nA note."))
    body = html(page)
    assert 'data-document="notes.md" data-state="failed"' in body
    assert "too many tokens" in body
    blend.error = None
    next(button for button in page.button if button.label == "Fill").click().run()
    drop(page)
    assert 'data-document="notes.md" data-state="filled"' in html(page)


def test_a_document_that_is_too_large_says_so(
    small_server: StartServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    drop(page, ("large.txt", b"word " * (5 << 20)))
    assert "25 MB; at most 20 MB are taken" in html(page)


def test_without_a_blend_documents_are_split_and_nothing_is_filled(small_server: StartServer, open_page: Open) -> None:
    plain, simllm = small_server(), small_server(offer=SIMLLM_OFFER, report=SIMLLM_REPORT)
    page = open_page(simllm, plain)
    drop(page, ("notes.md", b"# Notes"))
    assert 'data-document="notes.md" data-state="split"' in html(page)
    assert not [path for path, _, _ in simllm.requests + plain.requests if path == "/v1/completions"]


def test_bad_setting_is_shown_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_CONTENDERS", "nonsense")
    st.cache_resource.clear()
    page = AppTest.from_file(str(APP), default_timeout=20).run()
    assert not page.exception
    assert "KVARENA_CONTENDERS" in page.error[0].value
