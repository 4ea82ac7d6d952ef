"""Choosing a runtime, and everything about a card that can be told without one."""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from ai100.runtimes import card
from ai100.runtimes.card import (
    CardUnavailable,
    CompileFailed,
    CompileOptions,
    ContextLengths,
    Session,
    compile_model,
    open_on_card,
)
from ai100.runtimes.host import HostRuntime
from ai100.runtimes.runtime import StaticShapes
from ai100.settings import chosen, open_runtime
from support.tiny_models import save_tiny_model, tiny_tokenizer

SHAPES = StaticShapes(prefill_seq_len=8, ctx_len=48, full_batch_size=2, kv_cache_batch_size=4)
OPTIONS = CompileOptions(num_cores=14, num_devices=2, mxfp6_matmul=True, mxint8_kv_cache=True)
has_no_card = pytest.mark.skipif(not card.missing(), reason="this machine has a card")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("card") / "llama")


def write_script(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_an_unknown_runtime_names_the_choices(folder: Path) -> None:
    with pytest.raises(ValueError, match="no runtime 'gpu'; choose one of auto, qaic, host, onnx"):
        open_runtime("gpu", str(folder), SHAPES)


@has_no_card
def test_auto_is_the_host_without_a_card(folder: Path) -> None:
    runtime = open_runtime("auto", str(folder), SHAPES, random=True)
    assert runtime.name == "host"


def test_auto_is_the_card_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "missing", lambda: [])
    assert [chosen(name) for name in ("auto", "host", "onnx")] == ["qaic", "host", "onnx"]


@has_no_card
def test_qaic_without_a_card_says_all_that_is_missing(folder: Path) -> None:
    with pytest.raises(CardUnavailable) as raised:
        open_runtime("qaic", str(folder), SHAPES)
    assert all(what in str(raised.value) for what in card.missing())


def test_the_exported_graph_runs_by_name_and_is_removed(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime = open_runtime("onnx", str(folder), SHAPES)
    assert runtime.name == "onnx"
    assert runtime.prefill(0, [1, 2, 3], 0).shape == (runtime.vocab_size,)
    assert len(list(tmp_path.iterdir())) == 1
    del runtime
    gc.collect()  # in case a cycle still holds it
    assert not list(tmp_path.iterdir())


def test_only_the_host_makes_weights_up(folder: Path) -> None:
    with pytest.raises(ValueError, match="only 'host'"):
        open_runtime("onnx", str(folder), SHAPES, random=True)


def test_a_card_is_there_when_the_sdk_reports_one_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an SDK folder of its own, whose `qaic-util` prints what Qualcomm's does."""
    assert len(card.missing(tmp_path)) >= 3
    write_script(tmp_path / "exec" / "qaic-compile", "")
    monkeypatch.setitem(sys.modules, "qaicrt", module("qaicrt"))
    monkeypatch.setitem(sys.modules, "QEfficient", module("QEfficient"))
    write_script(tmp_path / "tools" / "qaic-util", 'echo "QID 0"; echo "  Status:Error"')
    assert card.missing(tmp_path) == [f"a card that {tmp_path}/tools/qaic-util -q reports as ready"]
    write_script(tmp_path / "tools" / "qaic-util", 'echo "QID 0"; echo "  Status:Ready"')
    assert card.missing(tmp_path) == []


def module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
    vars(made).update(names)
    return made


class Compiler:
    """Stands for `QEFFAutoModelForCausalLM` where there is no SDK: keeps what it is asked, answers what it is told."""

    answer: Any = "/qpc"
    comp_ctx_lengths_prefill: list[int] | None = None
    comp_ctx_lengths_decode: list[int] | None = None
    asked: dict[str, Any]

    @classmethod
    def from_pretrained(cls, path: str, **arguments: Any) -> type[Compiler]:
        cls.asked = {"path": path, **arguments}
        return cls

    @classmethod
    def compile(cls, **arguments: Any) -> str:
        cls.asked |= arguments
        if isinstance(cls.answer, Exception):
            raise cls.answer
        return str(cls.answer)


def test_every_setting_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "QEfficient", module("QEfficient", QEFFAutoModelForCausalLM=Compiler))
    assert compile_model("some/model", SHAPES, OPTIONS) == (Path("/qpc"), ContextLengths())
    assert Compiler.asked == {
        "path": "some/model",
        "continuous_batching": True,
        "prefill_seq_len": 8,
        "ctx_len": 48,
        "full_batch_size": 2,
        "kv_cache_batch_size": 4,
        "num_cores": 14,
        "num_devices": 2,
        "mxfp6_matmul": True,
        "mxint8_kv_cache": True,
    }


def test_context_lengths_are_what_the_compiler_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As QEfficient 1.23 does: what prefill has in common with decode is shortened, to multiples of 32."""
    monkeypatch.setitem(sys.modules, "QEfficient", module("QEfficient", QEFFAutoModelForCausalLM=Compiler))
    monkeypatch.setattr(Compiler, "comp_ctx_lengths_prefill", [992, 4096])
    monkeypatch.setattr(Compiler, "comp_ctx_lengths_decode", [1024, 4128])
    shapes = StaticShapes(ctx_len=4096)
    _, lengths = compile_model("some/model", shapes, CompileOptions(comp_ctx_lengths=(1024,)))
    assert Compiler.asked["qaic_config"] == {"ccl_enabled": True}
    assert Compiler.asked["comp_ctx_lengths_prefill"] == Compiler.asked["comp_ctx_lengths_decode"] == [1024]
    assert Compiler.asked["ctx_len"] == 4128, "so that prefill's reach to the end"
    assert "comp_ctx_lengths" not in Compiler.asked
    assert lengths == ContextLengths((992, 4096), (1024, 4128))
    lengths.check(shapes.ctx_len)
    with pytest.raises(ValueError, match="prefill attends over 4064 positions at most, and ctx_len is 4096"):
        ContextLengths((4064,), (4096,)).check(shapes.ctx_len)


@pytest.fixture(scope="module")
def qefficient() -> Path:
    folder = os.environ.get("QEFFICIENT")
    if not folder:
        pytest.skip("QEFFICIENT does not name a checkout of quic/efficient-transformers")
    return Path(folder, "QEfficient")


def parameters_of(path: Path, cls: str) -> dict[str, list[str]]:
    """Of each method of a class in a file, read and not imported: it needs packages that aren't here."""
    (found,) = (one for one in ast.parse(path.read_text()).body if isinstance(one, ast.ClassDef) and one.name == cls)
    methods = [one for one in found.body if isinstance(one, ast.FunctionDef)]
    return {one.name: [own.arg for own in (*one.args.args, *one.args.kwonlyargs)][1:] for one in methods}


def test_qefficient_takes_every_argument(qefficient: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of what ai100/Dockerfile names: nothing of ours may fall among its `**compiler_options`."""
    monkeypatch.setitem(sys.modules, "QEfficient", module("QEfficient", QEFFAutoModelForCausalLM=Compiler))
    compile_model("some/model", SHAPES, replace(OPTIONS, comp_ctx_lengths=(1024,)))
    own = parameters_of(qefficient / "transformers/models/modeling_auto.py", "QEFFAutoModelForCausalLM")
    known = {*own["from_pretrained"], *own["compile"], "path"}
    assert set(Compiler.asked) <= known
    session = parameters_of(qefficient / "generation/cloud_infer.py", "QAICInferenceSession")
    assert session["__init__"][:2] == ["qpc_path", "device_ids"]
    for name in ("input_names", "output_names", "skip_buffers", "set_buffers", "run", "deactivate"):
        ours: Any = inspect.getattr_static(Session, name)
        ours = ours.fget if isinstance(ours, property) else ours
        assert session[name] == list(inspect.signature(ours).parameters)[1:], name
    step = re.search(r"^CCL_UNIQNE_STEP = (\d+)$", (qefficient / "utils/constants.py").read_text(), re.MULTILINE)
    assert step is not None
    assert int(step[1]) == card.LENGTH_STEP


@pytest.mark.parametrize("error", [RuntimeError("Compiler stderr: out of cores"), FileNotFoundError("qaic-compile")])
def test_a_compile_failure_carries_the_compilers_message(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setitem(sys.modules, "QEfficient", module("QEfficient", QEFFAutoModelForCausalLM=Compiler))
    monkeypatch.setattr(Compiler, "answer", error)
    with pytest.raises(CompileFailed, match=f"some/model can't be compiled for .*ctx_len=48.*{error}"):
        compile_model("some/model", SHAPES, OPTIONS)


@has_no_card
def test_without_qefficient_and_sdk_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "QEfficient", None)
    with pytest.raises(CardUnavailable, match="QEfficient can't be imported"):
        compile_model("some/model", SHAPES, OPTIONS)
    with pytest.raises(CardUnavailable, match="no session on the card"):
        open_on_card(Path("/qpc"))


@pytest.mark.parametrize("name", ["num_cores", "num_devices"])
def test_compile_options_are_checked(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        CompileOptions(**options)


@pytest.mark.parametrize("runtime", ["host", "onnx"])
@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"max_position_embeddings": 32}, "ctx_len 48 is more than the 32 positions"),
        ("mistral", {"sliding_window": 40}, "sliding window of 40 tokens"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    ],
)
def test_models_whose_kv_slots_cant_hold_are_refused(
    tmp_path: Path, runtime: str, family: str, config: dict[str, Any], message: str
) -> None:
    folder = save_tiny_model(tmp_path, family, **config)
    with pytest.raises(ValueError, match=message):
        open_runtime(runtime, str(folder), SHAPES)


def test_a_family_with_more_in_its_attention_is_refused(tmp_path: Path) -> None:
    """Gemma 2 caps its scores."""
    tokenizer = tiny_tokenizer()
    config: Any = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Gemma2Attention needs softcap"):
        HostRuntime.load(str(tmp_path), SHAPES)


def test_a_family_that_says_its_kv_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config: Any = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2 doesn't run over KV slots"):
        HostRuntime.load(str(tmp_path), SHAPES)


def test_an_unknown_dtype_names_the_choices(folder: Path) -> None:
    with pytest.raises(ValueError, match="no dtype 'int4'; choose one of auto, float32"):
        HostRuntime.load(str(folder), SHAPES, dtype="int4")


def test_no_such_model_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        HostRuntime.load(str(tmp_path / "nothing-here"), SHAPES)
