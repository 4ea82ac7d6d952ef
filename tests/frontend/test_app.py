"""The whole page in Streamlit's own test runner, over small servers: it sees the settled page, no stream."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import state
from chat import Context
from chat_view import NUM_DRAWN
from contender_api import Sampling
from runs import Run
from support.small_openai_server import OFFER, REPORT, SIMLLM_OFFER, SIMLLM_REPORT, SmallServer, StartServer, report_of

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
        return AppTest.from_file(str(APP), default_timeout=60).run()

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
    assert page.slider(key="policy-ratio").label == "Recompute share (0 fastest, 1 exact)"
    explained = OFFER["parameters"]["policy"]["explanations"]
    for policy in ("kv_deviation", "chunk_head", "all"):
        page.selectbox(key="policy").set_value(policy).run()
        (told,) = [caption.value for caption in page.caption if caption.value.startswith(tuple(explained.values()))]
        other = "" if policy == "kv_deviation" else " CacheBlend's own policy is kv_deviation."
        assert told == explained[policy] + other


def test_the_contexts_header_counts_what_the_recompute_share_comes_to(
    small_server: StartServer, open_page: Open
) -> None:
    """As the slider is moved; of the chunks and what is between them, and not of what stands around them."""
    page = open_page(small_server(offer=OFFER), small_server())
    begins = "Context: 3 chunks, 18 tokens"
    for ratio, told in ((0.15, "about 2"), (0.3, "about 3"), (0.0, "none"), (1.0, "all")):
        page.slider(key="policy-ratio").set_value(ratio).run()
        assert page.expander[0].label == f"{begins}; a blend recomputes {told} of the chunks' 11"
    page.selectbox(key="policy").set_value("none").run()
    assert page.expander[0].label == begins, "there is no share to choose"
    page.selectbox(key="policy").set_value("kv_deviation").run()
    page.checkbox(key="run-blend").uncheck().run()
    assert page.expander[0].label == begins, "nobody recomputes"


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
    names = ["kv_deviation", "none", "all", "mine"]
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
    for policy in ("none", "all"):
        page.selectbox(key="policy").set_value(policy).run()
        assert [slider.key for slider in page.slider] == ["temperature"], policy


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
    assert body.count("data-decode=") == 2
    (to_blend,), (to_plain,) = blend.completions(), plain.completions()
    assert to_blend["messages"] == to_plain["messages"]
    separator = OFFER["separator"]
    assert to_blend["messages"][1]["content"] == f"{separator}This is two.{separator}This is one.{separator}Who?"
    assert to_blend["kv_transfer_params"]["kvarena"]["policy"] == "none"
    assert to_blend["max_tokens"] == to_plain["max_tokens"] == 9


def test_recomputed_tokens_without_scores_say_how_to_get_them(small_server: StartServer, open_page: Open) -> None:
    report = REPORT | {"recomputed_spans": [[7, 9]]}
    scores = {"token_scores": {"what": "share of attention", "tokens": [[7, 0.25], [8, 0.5]]}}
    blend = small_server(offer=OFFER | {"token_scores": True}, report=report)
    page = open_page(blend, small_server())
    page.chat_input[0].set_value("Who?").run()
    reused = [toggle for toggle in page.toggle if toggle.label.startswith("What was reused")]
    reused[0].set_value(True).run()
    (hint,) = hints(page)
    assert f"*{page.toggle(key='probabilities').label}*" in hint
    assert f"*{page.button(key='again-settings-0').label}*" in hint
    reused[0].set_value(False).run()
    page.toggle(key="probabilities").set_value(True).run()
    blend.report = report | scores
    page.button(key="again-settings-0").click().run()
    assert blend.completions()[1]["kv_transfer_params"]["kvarena"]["token_scores"] is True
    reused = [toggle for toggle in page.toggle if toggle.label.startswith("What was reused")]
    reused[1].set_value(True).run()
    assert "share of attention: 0.25" in html(page)
    assert not hints(page)


def hints(page: AppTest) -> list[str]:
    return [caption.value for caption in page.caption if "by what score" in caption.value]


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


def test_a_turn_is_asked_again_in_another_order_and_with_other_settings(
    small_server: StartServer, open_page: Open
) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    page.chat_input[0].set_value("Who?").run()
    page.button(key="again-same-0").click().run()
    page.button(key="again-order-0").click().run()
    page.slider(key="policy-ratio").set_value(0.5).run()
    page.button(key="again-settings-0").click().run()
    body = html(page)
    first, same, shuffled, other = blend.completions()
    assert same["messages"] == first["messages"]
    assert len(same["messages"]) == 2, "a repeat doesn't follow on from what it repeats"
    assert shuffled["messages"] != first["messages"]
    assert sorted(shuffled["messages"][1]["content"].split()) == sorted(first["messages"][1]["content"].split())
    assert other["messages"] == first["messages"]
    ratios = [asked["kv_transfer_params"]["kvarena"]["ratio"] for asked in blend.completions()]
    assert ratios == [0.15, 0.15, 0.15, 0.5]
    assert "Asked again: the same prompt and settings" in body
    assert "Asked again: the chunks in a new order" in body
    assert "Asked again: other settings" in body
    assert body.count('data-testid="divider"') == 1
    page.chat_input[0].set_value("And then?").run()
    assert len(plain.completions()[-1]["messages"]) == 4, "repeats are not in the conversation"


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
    again = AppTest.from_file(str(APP), default_timeout=60)
    again.query_params["chat"] = page.query_params["chat"]
    again.run()
    assert "Who?" in html(again)
    assert again.multiselect(key="chunks").value == ["two"]
    again.button(key="new-chat").click().run()
    assert "Who?" not in html(again)


def restarted(link: str | list[str]) -> AppTest:
    """The link in the page after its restart, which has lost all that a process holds."""
    st.cache_resource.clear()
    page = AppTest.from_file(str(APP), default_timeout=60)
    page.query_params["chat"] = link
    return page.run()


def test_a_link_restores_chat_texts_and_settings_after_a_restart(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    page.text_input(key="paste-name").set_value("mine").run()
    page.text_area(key="paste-text").set_value("Ann keeps bees.").run()
    page.button(key="paste-add").click().run()
    page.multiselect(key="chunks").set_value(["three", "mine", "one"]).run()
    page.slider(key="policy-ratio").set_value(0.4).run()
    page.slider(key="temperature").set_value(0.5).run()
    page.number_input(key="max-tokens").set_value(9).run()
    page.toggle(key="in-sequence").set_value(True).run()
    page.text_area(key="system-prompt").set_value("Be long.").run()
    page.checkbox(key="run-plain").uncheck().run()
    page.chat_input[0].set_value("Who?").run()

    again = restarted(page.query_params["chat"])
    assert "Hello, world" in html(again)
    assert not again.warning
    assert again.multiselect(key="chunks").value == ["three", "mine", "one"], "the order that it was asked in"
    assert "Ann keeps bees." in html(again)
    assert (again.slider(key="policy-ratio").value, again.slider(key="temperature").value) == (0.4, 0.5)
    assert again.text_area(key="system-prompt").value == "Be long."
    assert again.toggle(key="in-sequence").value
    assert not again.checkbox(key="run-plain").value
    again.chat_input[0].set_value("And then?").run()
    first, second = blend.completions()
    assert second["messages"][: len(first["messages"])] == first["messages"], "the conversation goes on"
    assert {**first, "messages": 0} == {**second, "messages": 0}
    assert not plain.completions()


def test_a_chat_is_shared_and_its_answers_and_requests_copied(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    assert not page.code
    page.chat_input[0].set_value("Who?").run()
    key = page.query_params["chat"]
    assert page.code[0].value == f"?chat={key if isinstance(key, str) else key[0]}"
    assert [button.label for button in page.download_button] == ["JSON", "Markdown", "curl commands"]
    next(toggle for toggle in page.toggle if toggle.label == "Copy").set_value(True).run()
    answer, request = page.code[1].value, page.code[2].value
    assert answer == "Hello, world"
    assert json.loads(request.splitlines()[-2]) == blend.completions()[0]


def test_a_blind_turn_hides_who_answered_until_the_vote(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    page.toggle(key="blind").set_value(True).run()
    page.chat_input[0].set_value("Who?").run()
    body = html(page)
    assert body.count("Hello, world") == 2
    assert not [told for told in ("pane-blend", "time to first token", "token-bar", "Blend</b>") if told in body]
    assert not any(toggle.label == "See the servers" for toggle in page.toggle)
    choices = [button for button in page.button if (button.key or "").startswith("vote-0-")]
    assert [button.label for button in choices] == ["A is best", "B is best", "Tie", "All bad"]
    choices[0].click().run()
    body = html(page)
    assert {"pane-blend", "pane-plain"} == {name for name in ("pane-blend", "pane-plain") if name in body}
    assert any(caption.value.startswith("Your vote: A, ") for caption in page.caption)
    assert "A: Blend" in body or "A: Plain" in body
    assert page.table[0].value["votes"].tolist()[0] >= 1


def test_what_a_chat_brings_along_and_the_server_does_not_take_is_left_out(
    small_server: StartServer, open_page: Open
) -> None:
    blend = small_server(offer=OFFER)
    page = open_page(blend, small_server())
    page.selectbox(key="policy").set_value("chunk_head").run()
    page.chat_input[0].set_value("Who?").run()
    parameters = {**OFFER["parameters"]}
    parameters["policy"] = {**parameters["policy"], "choices": ["kv_deviation"], "policies": ["kv_deviation"]}
    blend.offer = OFFER | {"policies": ["kv_deviation"], "parameters": parameters}
    again = restarted(page.query_params["chat"])
    assert "Who?" in html(again)
    assert again.selectbox(key="policy").value == "kv_deviation"


def test_a_long_chat_costs_a_click_no_more_than_a_short_one(small_server: StartServer, open_page: Open) -> None:
    """All turns are there when they are wanted."""
    page = open_page(small_server(offer=OFFER), small_server())
    page.chat_input[0].set_value("First?").run()
    opened = state.chat_store("chat").get(str(page.query_params["chat"]))
    assert opened
    first = opened.chat.turns[0]

    def drawn_with(num_turns: int) -> str:
        opened.chat.turns[:] = [dataclasses.replace(first, question=f"Turn {index}?") for index in range(num_turns)]
        return html(page.run())

    short, long = drawn_with(NUM_DRAWN), drawn_with(50)
    assert short.count('data-testid="pane-') == long.count('data-testid="pane-') == 2 * NUM_DRAWN
    assert "Turn 49?" in long
    assert "Turn 0?" not in long
    page.toggle(key=f"all-turns-{opened.chat.key}").set_value(True).run()
    assert html(page).count('data-testid="pane-') == 2 * 50


def test_an_unknown_link_says_so(small_server: StartServer, open_page: Open) -> None:
    open_page(small_server(offer=OFFER), small_server())
    again = restarted("0" * 32)
    assert [one.value for one in again.warning] == ["The chat of this link isn't known here. This is a new one."]


def test_a_state_folder_that_cant_be_written_costs_lasting_and_not_the_page(
    small_server: StartServer, open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_HOME", str(tmp_path / "one.txt"))
    page = open_page(small_server(offer=OFFER), small_server())
    page.chat_input[0].set_value("Who?").run()
    assert "Hello, world" in html(page)
    (notice,) = page.warning
    assert notice.value.startswith("Chats last only until the page is restarted: ")


def test_two_tabs_on_one_chat_see_each_others_turns(small_server: StartServer, open_page: Open) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    other = AppTest.from_file(str(APP), default_timeout=60)
    other.query_params["chat"] = page.query_params["chat"]
    other.run()
    page.chat_input[0].set_value("Who?").run()
    other.chat_input[0].set_value("And then?").run()
    page.run()
    assert html(page).count('data-testid="question"') == html(other).count('data-testid="question"') == 2
    assert len(plain.completions()[1]["messages"]) == 4


def test_a_repeat_that_waits_doesnt_go_to_a_new_chat(small_server: StartServer, open_page: Open) -> None:
    """There its turn doesn't exist: each look at the page failed until a reload."""
    plain = small_server()
    page = open_page(small_server(offer=OFFER), plain)
    page.chat_input[0].set_value("First?").run()
    page.checkbox(key="run-blend").uncheck()
    page.checkbox(key="run-plain").uncheck().run()
    page.button(key="again-same-0").click().run()
    assert [caption.value for caption in page.caption if "Next in line" in caption.value] == ["Next in line: a repeat"]
    page.button(key="new-chat").click().run()
    page.checkbox(key="run-plain").check().run()
    assert 'data-testid="question"' not in html(page)
    assert len(plain.completions()) == 1


def test_what_waits_is_shown_as_it_was_typed_and_stays_in_its_chat(small_server: StartServer, open_page: Open) -> None:
    plain = small_server()
    page = open_page(small_server(offer=OFFER), plain)
    asked = "Is *this* `2$` or ![x](y)?"
    put = page.session_state["asked"] = (page.session_state["chat"], asked)
    page.checkbox(key="run-blend").uncheck()
    page.checkbox(key="run-plain").uncheck().run()
    assert page.session_state["asked"] == put
    (shown,) = [caption.value for caption in page.caption if "Next in line" in caption.value]
    assert shown == r"Next in line: Is \*this\* \`2\$\` or \!\[x\]\(y\)?"
    page.button(key="new-chat").click().run()
    page.checkbox(key="run-plain").check().run()
    assert not plain.completions()


def test_a_question_while_another_tabs_is_under_way_waits_for_it(small_server: StartServer, open_page: Open) -> None:
    plain = small_server(hold_after=1)
    page = open_page(small_server(offer=OFFER), plain)
    opened = state.chat_store("chat").get(page.session_state["chat"])
    assert opened
    assert opened.begin(
        lambda: Run(opened.chat, Context(), "First?", state.chat_sessions(), Sampling(), in_sequence=True)
    )
    threading.Timer(1.0, plain.go_on.set).start()
    page.chat_input[0].set_value("Second?").run()
    asked = [body["messages"][-1]["content"] for body in plain.completions()]
    assert [text.rpartition(" ")[2] for text in asked] == ["First?", "Second?"]
    assert html(page).count('data-testid="question"') == 2
    assert "asked" not in page.session_state


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

    next(button for button in page.button if button.label == "Only this").click().run()
    assert page.multiselect(key="chunks").value == own
    page.chat_input[0].set_value("Who?").run()
    assert "Sentence 199" in blend.completions()[0]["messages"][1]["content"]
    next(button for button in page.button if str(button.key).startswith("remove-")).click().run()
    assert page.multiselect(key="chunks").options == ["one", "three", "two"]
    assert page.multiselect(key="chunks").value == []


def test_all_documents_are_used_at_once_or_one_added_to_those_chosen(
    small_server: StartServer, open_page: Open
) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    drop(page, ("bees.txt", LONG.encode()), ("broken.pdf", b"no pdf"))
    assert "use-all" not in [button.key for button in page.button], "one document is picked"
    drop(page, ("apes.md", b"# Apes"))
    page.multiselect(key="chunks").set_value(["two"]).run()
    bees = [name for name in page.multiselect(key="chunks").options if name.startswith("bees")]
    adds = [button for button in page.button if (button.key or "").startswith("add-")]
    adds[1].click().run()
    assert page.multiselect(key="chunks").value == ["two", "apes"]
    added = [button.disabled for button in page.button if (button.key or "").startswith("add-")]
    assert added == [False, True], "its chunks are all there"
    page.button(key="use-all").click().run()
    assert page.multiselect(key="chunks").value == [*bees, "apes"]
    page.multiselect(key="chunks").set_value([bees[1], "one"]).run()
    next(button for button in page.button if (button.key or "").startswith("add-")).click().run()
    assert page.multiselect(key="chunks").value == [bees[1], "one", bees[0], *bees[2:]]


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


def test_documents_say_which_of_them_come_back_with_the_chat(
    small_server: StartServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("documents_view.MAX_KEPT_BYTES", 100)
    page = open_page(small_server(offer=OFFER), small_server())
    drop(page, ("long.txt", b"The sea is wide. " * 9), ("short.txt", b"The sea."), ("scan.pdf", b"no pdf"))
    shown = {name: html(page).partition(f'data-document="{name}"')[2] for name in ("long.txt", "short.txt", "scan.pdf")}
    told = {name: body.partition("</div>")[0] for name, body in shown.items()}
    assert "Too large to come back after a reload" in told["long.txt"]
    assert "data-kept" not in told["short.txt"] + told["scan.pdf"]
    again = reloaded(page.query_params["chat"])
    assert 'data-document="short.txt"' in html(again)
    assert 'data-document="long.txt"' not in html(again)


def test_a_document_that_is_too_large_says_so(
    small_server: StartServer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    drop(page, ("large.txt", b"word " * (5 << 20)))
    assert "25 MB; at most 20 MB are taken" in html(page)


@pytest.mark.parametrize("fills", [True, False])
def test_a_new_file_in_the_folder_is_filled_or_said_to_be_cold(
    small_server: StartServer, open_page: Open, tmp_path: Path, fills: bool
) -> None:
    blend = small_server(offer=OFFER)
    page = open_page(blend, small_server())
    page.toggle(key="fill-at-once").set_value(fills).run()
    (tmp_path / "four.txt").write_text("This is four.")
    page.run()
    drop(page)
    assert "four" in page.multiselect(key="chunks").options
    state_of_it = "filled" if fills else "split"
    assert f'data-document="New in the data folder" data-state="{state_of_it}"' in html(page)
    assert ("cold: KV not filled" in html(page)) != fills
    asked = [body["prompt"] for path, body, _ in blend.requests if path == "/v1/completions"]
    assert len(asked) == fills
    assert all("This is four." in prompt and "This is one." not in prompt for prompt in asked)


def test_without_a_blend_documents_are_split_and_nothing_is_filled(small_server: StartServer, open_page: Open) -> None:
    plain, simllm = small_server(), small_server(offer=SIMLLM_OFFER, report=SIMLLM_REPORT)
    page = open_page(simllm, plain)
    drop(page, ("notes.md", b"# Notes"))
    assert 'data-document="notes.md" data-state="split"' in html(page)
    assert not [path for path, _, _ in simllm.requests + plain.requests if path == "/v1/completions"]


def test_a_pasted_text_is_edited_kept_cold_and_saved(
    small_server: StartServer, open_page: Open, tmp_path: Path
) -> None:
    blend = small_server(offer=OFFER)
    page = open_page(blend, small_server())
    page.toggle(key="fill-at-once").set_value(False).run()
    page.text_input(key="paste-name").set_value("one").run()
    page.text_area(key="paste-text").set_value("Ann keeps bees.").run()
    page.button(key="paste-add").click().run()
    assert "cold: KV not filled" in html(page)
    page.text_input(key="paste-name").set_value("two").run()
    page.text_area(key="paste-text").set_value("Ben keeps bees.").run()
    page.button(key="paste-add").click().run()
    assert page.text_area(key="paste-text").value == ""
    assert "one.txt" in page.multiselect(key="chunks").options
    next(area for area in page.text_area if area.value == "Ann keeps bees.").set_value("Ann keeps owls.").run()
    next(button for button in page.button if button.label == "Keep").click().run()
    assert html(page).index('data-document="one.txt"') < html(page).index('data-document="two.txt"'), "it has its place"
    [button for button in page.button if str(button.key).startswith("remove-")][-1].click().run()
    next(button for button in page.button if button.label == "Only this").click().run()
    assert "Ann keeps owls." in html(page)
    assert not [path for path, _, _ in blend.requests if path == "/v1/completions"]
    next(button for button in page.button if button.label == "Fill").click().run()
    drop(page)
    assert 'data-document="one.txt" data-state="filled"' in html(page)
    next(button for button in page.button if str(button.key).startswith("save-")).click().run()
    assert (tmp_path / "one 2.txt").read_text() == "Ann keeps owls."
    assert (tmp_path / "one.txt").read_text() == "This is one."
    assert "one 2" in page.multiselect(key="chunks").options
    assert 'data-testid="upload"' not in html(page)


def test_a_context_that_is_too_long_is_named_before_asking(
    small_server: StartServer, open_page: Open, tmp_path: Path
) -> None:
    blend, plain = small_server(offer=OFFER), small_server()
    page = open_page(blend, plain)
    assert not page.warning
    for name, count in (("wide", 1500), ("wider", 3000)):
        (tmp_path / f"{name}.txt").write_text("word " * count)
    st.cache_data.clear()
    page.run()
    names = page.multiselect(key="chunks").options
    page.multiselect(key="chunks").set_value(["one", *(name for name in names if name.startswith("wide"))]).run()
    assert "Blend takes 4,096, Plain takes 4,096. They refuse longer prompts." in page.warning[0].value
    page.button(key="drop-chunks").click().run()
    assert not page.warning
    kept = page.multiselect(key="chunks").value
    assert kept[0] == "one"
    assert 1 < len(kept) < len(names)


def test_a_conversation_that_is_too_long_is_named_before_asking(small_server: StartServer, open_page: Open) -> None:
    """Its context fits, and its turns don't."""
    blend = small_server(offer=OFFER)
    blend.report = REPORT | {"num_prompt_tokens": 4090}
    page = open_page(blend, small_server())
    page.chat_input[0].set_value("First?").run()
    (warned,) = [warning.value for warning in page.warning]
    assert "The conversation has 4,0" in warned
    assert "Blend takes 4,096" in warned
    page.button(key="new-chat").click().run()
    assert not page.warning


def test_bad_setting_is_shown_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_CONTENDERS", "nonsense")
    st.cache_resource.clear()
    page = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not page.exception
    assert "KVARENA_CONTENDERS" in page.error[0].value


def test_a_run_after_a_fragment_of_the_sidebar_draws_into_the_main_area() -> None:
    """As when a click comes while the fragment runs: Streamlit then leaves the fragment's place behind."""

    def script() -> None:
        import runpy
        from pathlib import Path
        from unittest.mock import patch

        import streamlit as st
        from streamlit.delta_generator_singletons import context_dg_stack, get_dg_singleton_instance

        class Navigation:
            def run(self) -> None:
                st.text("in the main area")

        places = get_dg_singleton_instance()
        context_dg_stack.set((places.main_dg, places.sidebar_dg))
        with patch("streamlit.navigation", return_value=Navigation()), patch("streamlit.Page"):
            runpy.run_path(str(Path("frontend/app.py").resolve()))

    app = AppTest.from_function(script, default_timeout=60).run()
    assert not app.exception
    assert [text.value for text in app.main.text] == ["in the main area"]
    assert not app.sidebar.text


def test_a_reload_keeps_what_was_set_before_anything_was_asked(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    page.text_input(key="paste-name").set_value("mine").run()
    page.text_area(key="paste-text").set_value("Ann <b>keeps</b> *bees*.").run()
    page.button(key="paste-add").click().run()
    page.text_input(key="paste-name").set_value("not picked").run()
    page.text_area(key="paste-text").set_value("Bert keeps goats.").run()
    page.button(key="paste-add").click().run()
    page.multiselect(key="chunks").set_value(["three", "mine"]).run()
    page.text_area(key="system-prompt").set_value("Be long.").run()
    page.slider(key="policy-ratio").set_value(0.4).run()
    page.checkbox(key="run-plain").uncheck().run()
    page.toggle(key="fill-at-once").set_value(False).run()
    for again in (reloaded(page.query_params["chat"]), restarted(page.query_params["chat"])):
        assert not again.warning
        assert again.multiselect(key="chunks").value == ["three", "mine"]
        assert again.multiselect(key="chunks").options == ["one", "three", "two", "mine", "not picked"]
        assert html(again).count('data-testid="upload"') == 2
        assert "Ann &lt;b&gt;keeps&lt;/b&gt; *bees*." in html(again)
        assert again.text_area(key="system-prompt").value == "Be long."
        assert again.slider(key="policy-ratio").value == 0.4
        assert not again.checkbox(key="run-plain").value
        assert not again.toggle(key="fill-at-once").value


def reloaded(link: str | list[str]) -> AppTest:
    """In another session of the same process."""
    page = AppTest.from_file(str(APP), default_timeout=60)
    page.query_params["chat"] = link
    return page.run()


def test_a_reload_keeps_what_was_set_since_the_last_question(small_server: StartServer, open_page: Open) -> None:
    """Also what was set back to its default, which the address doesn't tell, and not a repeat's order."""
    blend = small_server(offer=OFFER)
    page = open_page(blend, small_server())
    page.number_input(key="max-tokens").set_value(9).run()
    page.multiselect(key="chunks").set_value(["two", "three"]).run()
    page.chat_input[0].set_value("Who?").run()
    order = page.session_state["order"]
    page.button(key="again-order-0").click().run()
    assert reloaded(page.query_params["chat"]).session_state["order"] == order
    page.number_input(key="max-tokens").set_value(128).run()
    page.multiselect(key="chunks").set_value(["one"]).run()
    again = restarted(page.query_params["chat"])
    assert again.number_input(key="max-tokens").value == 128
    assert again.multiselect(key="chunks").value == ["one"]
    assert html(again).count('data-testid="question"') == 2


def test_a_tab_on_which_nobody_sets_anything_leaves_the_newer_draft(
    small_server: StartServer, open_page: Open, tmp_path: Path
) -> None:
    """Also when a file is edited and the blend comes up, with another separator and new controls."""
    blend = small_server(offer=OFFER, health=(503, {}))
    idle = open_page(blend, small_server())
    newer = reloaded(idle.query_params["chat"])
    newer.slider(key="temperature").set_value(0.5).run()
    (tmp_path / "one.txt").write_text("This is another one.")
    blend.health = (200, {})
    st.cache_data.clear()
    for session in state.chat_sessions().values():
        session.refreshed_s = float("-inf")
    idle.run()
    assert "another one" in html(idle)
    assert idle.slider(key="policy-ratio").value == 0.15
    assert reloaded(idle.query_params["chat"]).slider(key="temperature").value == 0.5
    untouched = idle.button(key="new-chat").click().run()
    (tmp_path / "one.txt").write_text("This is a third one.")
    st.cache_data.clear()
    untouched.run()
    assert "The chat of this link isn't known" in restarted(untouched.query_params["chat"]).warning[0].value


def test_the_address_goes_before_what_the_chat_was_left_at(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    page.number_input(key="max-tokens").set_value(9).run()
    page.slider(key="temperature").set_value(0.5).run()
    again = AppTest.from_file(str(APP), default_timeout=60)
    again.query_params["chat"] = page.query_params["chat"]
    again.query_params["max-tokens"] = "7"
    again.run()
    assert (again.number_input(key="max-tokens").value, again.slider(key="temperature").value) == (7, 0.5)


def test_a_new_chat_goes_on_with_the_choices_also_after_a_reload(small_server: StartServer, open_page: Open) -> None:
    page = open_page(small_server(offer=OFFER), small_server())
    page.multiselect(key="chunks").set_value(["two"]).run()
    page.button(key="new-chat").click().run()
    assert reloaded(page.query_params["chat"]).multiselect(key="chunks").value == ["two"]
    exported = page.download_button[0] if page.download_button else None
    assert exported is None, "nothing was asked, so there is nothing to share"


def test_settings_of_the_address_that_nothing_takes_are_named(small_server: StartServer, open_page: Open) -> None:
    open_page(small_server(offer=OFFER), small_server())
    page = AppTest.from_file(str(APP), default_timeout=60)
    asked = {"max-tokens": "abc", "temperature": "9", "policy": "nonsense", "run-gone": "false", "*foo*": "<b>"}
    taken = {"run-plain": "false", "policy-ratio": "0.40", "in-sequence": "true", "ignore-eos": "false"}
    taken |= {"measured": "Plain", "measure-lengths": "300"}  # by Measure
    for name, value in (asked | taken).items():
        page.query_params[name] = value
    page.run()
    (told,) = [warning.value for warning in page.warning]
    named = told.replace("\\", "").partition(": ")[2].split(", ")
    assert named == [f"{name} = {value}" for name, value in asked.items()]
    assert "\\*foo\\* = \\<b\\>" in told, "letter for letter"
    assert (page.number_input(key="max-tokens").value, page.slider(key="policy-ratio").value) == (128, 0.4)
    page.switch_page("views/conversations.py").run()
    assert not page.warning, "they are the Arena's"
    page.switch_page("views/arena.py").run()
    page.chat_input[0].set_value("Who?").run()
    assert not page.warning
    page.button(key="new-chat").click().run()
    assert not page.warning, "it was another chat that was opened with them"


def test_settings_of_the_address_wait_for_the_server_that_may_take_them(
    small_server: StartServer, open_page: Open
) -> None:
    blend = small_server(offer=OFFER, health=(503, {}))
    open_page(blend, small_server())
    page = AppTest.from_file(str(APP), default_timeout=60)
    for name, value in {"policy-ratio": "0.4", "policy-nonsense": "1", "mode": "aligned"}.items():
        page.query_params[name] = value
    page.run()
    assert not page.warning
    blend.health = (200, {})
    for session in state.chat_sessions().values():
        session.refreshed_s = float("-inf")
    page.run()
    assert page.slider(key="policy-ratio").value == 0.4
    told = page.warning[0].value.replace("\\", "")
    assert told.endswith(": policy-nonsense = 1, mode = aligned")
    page.slider(key="policy-ratio").set_value(0.5).run()
    assert "policy-ratio" not in page.warning[0].value.replace("\\", "")
