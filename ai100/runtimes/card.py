"""The card: is there a Cloud AI 100 that this machine can use; compile a model for it; open a session on it.

The places looked at are those of Qualcomm's SDK, as QEfficient knows them (COMPILER in
QEfficient/utils/constants.py, cloud_infer.py, device_utils.py). QEfficient is imported only here.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ai100.runtimes.qefficient import Session
from ai100.runtimes.runtime import StaticShapes

SDK = Path("/opt/qti-aic")
QUERY_TIMEOUT_S = 30


def missing(sdk: Path = SDK) -> list[str]:
    """What a card's runtime needs and this machine lacks, in words; nothing when it can run."""
    found = {
        "the Python package QEfficient": find_spec("QEfficient") is not None,
        f"the compiler of the Apps SDK ({sdk}/exec/qaic-compile)": (sdk / "exec" / "qaic-compile").is_file(),
        f"qaicrt of the Platform SDK ({sdk}/dev/lib)": _has_qaicrt(sdk),
        f"a card that {sdk}/tools/qaic-util -q reports as ready": _has_ready_device(sdk),
    }
    return [what for what, is_there in found.items() if not is_there]


def _has_qaicrt(sdk: Path) -> bool:
    return find_spec("qaicrt") is not None or any((sdk / "dev" / "lib" / platform.machine()).glob("qaicrt*"))


def _has_ready_device(sdk: Path) -> bool:
    try:
        query = [str(sdk / "tools" / "qaic-util"), "-q"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return "Status:Ready" in answer.stdout


class CardUnavailable(RuntimeError):
    """This machine can't run a card's runtime; the message says what is missing."""


class CompileFailed(RuntimeError):
    """The message has the compiler's own."""


@dataclass(frozen=True)
class CompileOptions:
    """What the compiler may trade precision and cores for. The names and defaults are QEfficient's.

    `mxfp6_matmul` keeps weights, `mxint8_kv_cache` keeps the KV in fewer bits: answers change a little with either.
    Raises `ValueError` naming the value.
    """

    num_cores: int = 16
    num_devices: int = 1
    mxfp6_matmul: bool = False
    mxint8_kv_cache: bool = False

    def __post_init__(self) -> None:
        for name in ("num_cores", "num_devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def compile_model(path: str, shapes: StaticShapes, options: CompileOptions) -> Path:
    """Exports and compiles, or finds what was compiled before with the same settings, in QEfficient's own cache.

    Two shapes: a prefill of `(1, prefill_seq_len)` tokens, a decode step of `(full_batch_size, 1)`
    (`QEFFAutoModelForCausalLM.compile`, QEfficient/transformers/models/modeling_auto.py).
    Returns the folder of the compiled program. Raises `CardUnavailable`, `CompileFailed`; `OSError` for no such model.
    """
    try:
        from QEfficient import QEFFAutoModelForCausalLM
    except ImportError as error:
        raise CardUnavailable(f"QEfficient can't be imported: {error}") from error
    model = QEFFAutoModelForCausalLM.from_pretrained(path, continuous_batching=True)
    try:
        return Path(model.compile(**asdict(shapes), **asdict(options)))
    except Exception as error:
        raise CompileFailed(f"{path} can't be compiled for {shapes} with {options}: {error}") from error


def open_on_card(program: Path, device_ids: Sequence[int] | None = None) -> Session:
    """`device_ids` are QIDs; without them the driver picks. Raises `CardUnavailable`."""
    try:
        from QEfficient.generation.cloud_infer import QAICInferenceSession

        session: Session = QAICInferenceSession(program, list(device_ids) if device_ids else None)
    except Exception as error:  # no SDK, no card, no free cores: each its own type
        raise CardUnavailable(f"no session on the card: {error}") from error
    return session
