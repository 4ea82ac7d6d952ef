"""Which model is meant, how large it is, and whether the hub gives it to us; against a small hub of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from kvarena.home import StackError, project_root
from kvarena.model import cached_snapshot, check_hub_access, find_model


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
