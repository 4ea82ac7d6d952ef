"""Chunk boundaries in tokens, the drawn context, examples, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from chat import Answer, Context
from chat_session import ChatSession
from chat_view import answer_html
from context_view import ChunkSpan, chunk_spans, context_html, count_context
from examples import follow_ups, load_examples, opening_chunks
from kvarena.contenders.spec import ReportView
from kvarena.documents import TextChunk, load_chunks, load_system_prompt
from settings import DEFAULT_CONTENDERS, REPORT_VIEWS, Contender, Service, read_settings
from support.small_openai_server import StartServer
from tokens import common_prefix

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>alert(1)</script> **bold** $x^2$ :smile: 🐝 &amp; "quoted"'


def test_spans_follow_the_order_of_the_chunks() -> None:
    prompt = [1, 9, 9, 5, 6, 7, 8, 9, 9, 2, 3, 4, 9, 9, 5, 6, 7, 8, 0]
    spans = chunk_spans(prompt, [[5, 6, 7, 8], [2, 3, 4], [5, 6, 7, 8]])
    assert [(span.start, span.end) for span in spans] == [(3, 7), (9, 12), (14, 18)]


def test_an_edge_that_merged_with_its_neighbour_is_bridged() -> None:
    chunk = [20, 21, 22, 23, 24, 25]
    prompt = [1, 2, 99, 21, 22, 23, 24, 98, 3]
    assert chunk_spans(prompt, [chunk]) == [ChunkSpan(6, 2, 8)]


def test_a_chunk_that_is_not_found_has_its_count_and_no_place() -> None:
    assert chunk_spans([1, 2, 3], [[7, 8, 9], [2, 3], []]) == [ChunkSpan(3), ChunkSpan(2, 1, 3), ChunkSpan(0)]


def test_text_before_the_chunks_is_not_taken_for_one() -> None:
    assert common_prefix([7, 1, 2, 3], [7, 1, 5]) == 2
    assert chunk_spans([7, 7, 9, 7], [[7]], start=2) == [ChunkSpan(1, 3, 4)]


def test_tokens_are_counted_by_the_contender(small_server: StartServer) -> None:
    server = small_server()
    session = ChatSession(Contender("c", "C", server.url))
    chunks = (TextChunk("a", "Ann keeps bees"), TextChunk("b", "Be brief"))
    count = count_context(session, Context("Be brief", chunks, " <sep> "))
    session.close()
    # [system] Be brief [user] <sep> Ann keeps bees <sep> Be brief <sep> [assistant]
    assert count.total == 13
    assert [(span.start, span.end) for span in count.spans] == [(5, 8), (9, 11)]


def test_a_system_prompt_of_the_models_template_is_shown_where_the_context_has_none(small_server: StartServer) -> None:
    own = "You are a <b>helpful</b> assistant"
    chunks = (TextChunk("a", "Ann keeps bees"),)
    for own_system_prompt, system in ((own, ""), (own, "Be brief"), ("", "")):
        session = ChatSession(Contender("c", "C", small_server(own_system_prompt=own_system_prompt).url))
        context = Context(system, chunks, " <sep> ")
        html = context_html(context, count_context(session, context))
        session.close()
        assert ("You are a &lt;b&gt;helpful&lt;/b&gt; assistant" in html) == (own_system_prompt == own and not system)


def test_texts_are_shown_letter_for_letter() -> None:
    context = Context(HOSTILE, (TextChunk(HOSTILE, HOSTILE),), HOSTILE)
    answer = Answer(Contender("c", HOSTILE, "http://x"), text=HOSTILE, state="failed", error=HOSTILE)
    for html in (context_html(context, None), answer_html(answer)):
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "**bold** $x^2$ :smile: 🐝" in html


def test_shipped_town_is_complete() -> None:
    folder = ROOT / "backend" / "models" / "town" / "notes"
    names = [chunk.name for chunk in load_chunks(folder)]
    examples = load_examples(folder, names)
    lines = (folder / "questions.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(names) >= 16
    assert load_system_prompt(folder)
    assert len(entries) >= 120
    assert all(entry["answers"] for entry in entries)
    assert len(examples) == sum("history" not in entry for entry in entries)
    assert [example.kind for example in examples[:4]] == ["across", "single", "across", "single"]


def test_a_file_may_say_which_questions_are_offered(tmp_path: Path) -> None:
    lines = [
        {"question": "Who?", "chunks": ["a"]},
        {"question": "Where?", "chunks": ["b", "a"], "example": True},
        {"question": "When?", "chunks": ["a"], "example": True},
        {"question": "Why there?", "chunks": ["b", "a"], "example": True, "history": [{"question": "Where?"}]},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [example.question for example in load_examples(tmp_path, ["a", "b"])] == ["Where?", "When?"]
    assert opening_chunks(tmp_path, ["a", "b"]) == ("b", "a")
    assert follow_ups(tmp_path, ["a", "b"], ["Where?"]) == ["Why there?"]
    assert follow_ups(tmp_path, ["a", "b"], ["Where?", "Why there?"]) == follow_ups(tmp_path, ["a", "b"], []) == []
    (tmp_path / "questions.jsonl").write_text(json.dumps(lines[0]))
    assert opening_chunks(tmp_path, ["a"]) == ()


def test_examples_that_cant_be_used_are_left_out(tmp_path: Path) -> None:
    good = {"question": "Who?", "answers": ["Ann"], "kind": "single", "chunks": ["a"]}
    bad = ["", "no json", "[]", json.dumps({**good, "chunks": ["gone"]}), json.dumps({"question": "Who?"})]
    lines = [line.encode() for line in (*bad, "[" * 100_000, json.dumps(good))]
    (tmp_path / "questions.jsonl").write_bytes(b"\n".join([b'{"question": "\xdcber?", "chunks": ["a"]}', *lines]))
    assert [example.question for example in load_examples(tmp_path, ["a", "b"])] == ["Who?"]
    assert load_examples(tmp_path / "nowhere", ["a"]) == []


def test_settings_come_from_the_environment() -> None:
    entry = {"name": "mine", "title": "Mine", "url": "http://host:1/"}
    folders = {"KVARENA_DATA_DIR": "/tmp/chunks", "KVARENA_RESULTS_DIR": "/tmp/results"}
    settings = read_settings({"KVARENA_CONTENDERS": json.dumps([entry]), **folders})
    assert settings.contenders == (Contender("mine", "Mine", "http://host:1"),)
    own = read_settings({"KVARENA_CONTENDERS": json.dumps([entry | {"approximate": True}])})
    assert own.contenders == (Contender("mine", "Mine", "http://host:1", approximate=True),)
    told = entry | {"explanation": "Mine.", "approximate": False, "report": "slots"}
    (read,) = read_settings({"KVARENA_CONTENDERS": json.dumps([told])}).contenders
    assert (read.explanation, read.approximate, read.report) == ("Mine.", False, "slots")
    assert (settings.data_dir, settings.results_dir) == (Path("/tmp/chunks"), Path("/tmp/results"))
    sized = read_settings({"KVARENA_CHUNK_TOKENS": "256", "KVARENA_TOKENIZER": "/tmp/model"})
    assert (sized.chunk_tokens, sized.tokenizer) == (256, "/tmp/model")
    inside = {"KVARENA_PUBLIC_URLS": json.dumps({"mine": "http://127.0.0.1:9", "other": "http://127.0.0.1:8"})}
    inside |= {"KVARENA_HOST_FOLDERS": json.dumps({"/in/data": "texts"})}
    contained = read_settings({"KVARENA_CONTENDERS": json.dumps([entry])} | inside)
    assert [one.address for one in contained.contenders] == ["http://127.0.0.1:9"]
    assert contained.on_the_host(Path("/in/data/a.txt")) == Path("texts/a.txt")
    assert contained.on_the_host(Path("/in/other")) == Path("/in/other")
    assert read_settings({}).contenders == DEFAULT_CONTENDERS
    assert [(one.name, one.url, one.report) for one in DEFAULT_CONTENDERS] == [
        ("blend", "http://127.0.0.1:8000", "blend"),
        ("plain", "http://127.0.0.1:8001", ""),
    ]
    assert read_settings({}).services == (Service("lmcache-server", "LMCache server", "http://127.0.0.1:8080"),)
    assert settings.services == (), "nobody said that these contenders have one behind them"
    store = {"name": "store", "title": "Store", "url": "http://host:2/"}
    (service,) = read_settings({"KVARENA_SERVICES": json.dumps([store])}).services
    assert service == Service("store", "Store", "http://host:2")
    assert read_settings({"KVARENA_SERVICES": "[]"}).services == ()
    assert "secret" not in repr(read_settings({"KVARENA_API_KEY": "secret"}))


def test_the_page_has_every_view_that_a_spec_can_name() -> None:
    assert set(REPORT_VIEWS) == set(get_args(ReportView))


@pytest.mark.parametrize(
    "environment",
    [
        {"KVARENA_CONTENDERS": "blend"},
        {"KVARENA_CONTENDERS": "[]"},
        {"KVARENA_CONTENDERS": '[{"name": "a b", "title": "A", "url": "http://x"}]'},
        {"KVARENA_CONTENDERS": '[{"name": "a", "title": "A", "url": "localhost:8000"}]'},
        {"KVARENA_CONTENDERS": '[{"name": "a", "title": "A"}]'},
        {"KVARENA_CONTENDERS": '[{"name": "a", "title": "A", "url": "http://x", "report": "b"}]'},
        {"KVARENA_CONTENDERS": json.dumps([{"name": "a", "title": "A", "url": "http://x"}] * 2)},
        {"KVARENA_SERVICES": "lmcache"},
        {"KVARENA_SERVICES": '[{"name": "a", "title": "A", "url": "tcp://x"}]'},
        {"KVARENA_CHUNK_TOKENS": "9"},
        {"KVARENA_CHUNK_TOKENS": "²"},
        {"KVARENA_TIMEOUT_S": "soon"},
        {"KVARENA_TIMEOUT_S": "-1"},
    ],
)
def test_bad_settings_name_their_variable(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(environment))):
        read_settings(environment)
