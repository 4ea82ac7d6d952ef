"""The model to serve: a local folder or a name on the Hugging Face hub, and what can be known of it beforehand.

`find_model` decides which of the two a setting means. Whether a hub model may be downloaded is asked here as well,
so that a gated one without a token stops `up` before anything is started.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.stack import default_model
from kvarena.stack.errors import StackError
from kvarena.stack.home import Home, project_root
from kvarena.vllm_plugin.config import read_model_profile

TOWN = "town"
SHIPPED_MODELS = {TOWN: "backend/models/town"}
"""What `--model` calls the models that lie in the repository, and their folders."""
DEFAULT_GPU_MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
DEFAULT_DATA_DIR = "data"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Model:
    """`name` is what vLLM's `--model` gets; `served_name` is what clients ask for."""

    name: str
    served_name: str
    is_local: bool

    def weight_bytes(self, hf_home: Path | None) -> int:
        """Size of the weights on disk, or, where there are none, an estimate from `config.json`; 0 if unknown."""
        folder = self._folder(hf_home)
        if folder is None:
            return 0
        for pattern in WEIGHT_PATTERNS:
            if sizes := [path.stat().st_size for path in folder.glob(pattern)]:
                return sum(sizes)
        return _estimate_weight_bytes(folder / "config.json")

    def architecture(self, hf_home: Path | None) -> str:
        """`model_type` of its `config.json`, as llama; empty where it isn't on this machine or says nothing."""
        return str(self._config(hf_home).get("model_type") or "")

    def dtype(self, hf_home: Path | None) -> str:
        """Its weights' own number format, as bfloat16; empty where that isn't known, and for quantised weights."""
        config = self._config(hf_home)
        if "quantization_config" in config:
            return ""
        return str(config.get("dtype") or config.get("torch_dtype") or "")

    @property
    def data_dir(self) -> Path:
        """The documents that go with it: its profile's, else the project's. Raises `ValueError` for a bad profile."""
        own = read_model_profile(self.name).get("data") if self.is_local else None
        return Path(self.name, str(own)) if own else project_root() / DEFAULT_DATA_DIR

    def _config(self, hf_home: Path | None) -> dict[str, Any]:
        """Its `config.json`; empty where it isn't on this machine or can't be read."""
        folder = self._folder(hf_home)
        try:
            found = json.loads((folder / "config.json").read_text()) if folder else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _folder(self, hf_home: Path | None) -> Path | None:
        return Path(self.name) if self.is_local else cached_snapshot(self.name, hf_home)


def find_model(setting: str | None, profile: str) -> Model:
    """The model a setting names, or the profile's default. Raises `StackError` for a folder that isn't there.

    On a CPU that is the one that `default_model.obtain` has made ready, and the town model as long as it hasn't.
    """
    if setting is None and profile == "cpu" and default_model.is_ready(home := Home.find()):
        return _local(default_model.folder_of(home))
    text = setting or (TOWN if profile == "cpu" else DEFAULT_GPU_MODEL)
    if text in SHIPPED_MODELS:
        return _local(project_root() / SHIPPED_MODELS[text])
    for base in (Path.cwd(), project_root()):
        folder = base / Path(text).expanduser()
        if folder.is_dir():
            return _local(folder.resolve())
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise StackError(
            f"MODEL is {text!r}, and there is no such folder; "
            "it must be a folder with config.json, or a hub name such as org/model"
        )
    return Model(name=text, served_name=text, is_local=False)


def _local(folder: Path) -> Model:
    if not (folder / "config.json").is_file():
        raise StackError(f"MODEL is {str(folder)!r}, and there is no config.json in it")
    return Model(name=str(folder), served_name=folder.name, is_local=True)


def cached_snapshot(name: str, hf_home: Path | None) -> Path | None:
    """The folder of a hub model that has been downloaded; `None` when it hasn't."""
    home = hf_home or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) if hf_home is None else home / "hub"
    repository = hub / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = repository / "snapshots" / revision
    return folder if (folder / "config.json").exists() else None


def check_hub_access(name: str, token: str | None, hf_home: Path | None) -> None:
    """Raises `StackError` when the hub would not give us the model and no copy of it is on this machine."""
    if cached_snapshot(name, hf_home) is not None:
        return
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    token = token or get_token()
    api = HfApi(token=token or False)
    try:
        info = api.model_info(name, timeout=HUB_TIMEOUT_S)
        if info.gated and token is None:
            raise StackError(
                f"{name} is a gated model: accept its terms at {api.endpoint}/{name}, then put a token of your "
                "account into HF_TOKEN (environment or .env)"
            )
        if info.gated:
            api.auth_check(name)
    except GatedRepoError as error:
        raise StackError(
            f"{name} is a gated model, and the account of HF_TOKEN has no access: ask for it at {api.endpoint}/{name}"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "" if token else "; a private model needs HF_TOKEN"
        raise StackError(f"the hub knows no model {name!r}{hint}") from error
    except HfHubHTTPError as error:
        raise StackError(f"the hub refused to tell about {name}: {error}") from error
    except StackError:
        raise
    except Exception as error:  # no connection: each transport of the hub's client has exceptions of its own
        raise StackError(
            f"{name} is not on this machine, and the hub at {api.endpoint} can't be reached "
            f"({type(error).__name__}); set MODEL to a local folder, or LOCAL_HF_HOME to a cache that holds it"
        ) from error


def _estimate_weight_bytes(config_path: Path) -> int:
    """Decoder weights in 16 bits from a config alone (for `--load-format dummy`)."""
    try:
        config: dict[str, Any] = json.loads(config_path.read_text())
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        vocabulary, inner = int(config["vocab_size"]), int(config["intermediate_size"])
        heads = int(config["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return 2 * (layers * (attention + 3 * hidden * inner) + embeddings)
