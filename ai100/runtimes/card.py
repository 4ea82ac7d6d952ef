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
from typing import Any

from ai100.runtimes.qefficient import ContextLengths, Session
from ai100.runtimes.runtime import StaticShapes

SDK = Path("/opt/qti-aic")
QUERY_TIMEOUT_S = 30
LENGTH_STEP = 32
"""By so much QEfficient shortens a context length of prefill that decode has too (CCL_UNIQNE_STEP), the last as well.
So many more positions are compiled."""


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
    `comp_ctx_lengths`: a run attends over the least of these that has all its positions, in place of all `ctx_len`.
    Raises `ValueError` naming the value.
    """

    num_cores: int = 16
    num_devices: int = 1
    mxfp6_matmul: bool = False
    mxint8_kv_cache: bool = False
    comp_ctx_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_cores", "num_devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if any(length < 1 for length in self.comp_ctx_lengths):
            raise ValueError(f"comp_ctx_lengths must be at least 1, not {min(self.comp_ctx_lengths)}")


def compile_model(path: str, shapes: StaticShapes, options: CompileOptions) -> tuple[Path, ContextLengths]:
    """Exports and compiles, or finds what was compiled before with the same settings, in QEfficient's own cache.

    Two shapes: a prefill of `(1, prefill_seq_len)` tokens, a decode step of `(full_batch_size, 1)`
    (`QEFFAutoModelForCausalLM.compile`, QEfficient/transformers/models/modeling_auto.py).
    Returns the folder of the compiled program, and the context lengths in it: QEfficient shortens those of prefill
    until they differ from decode's. Raises `CardUnavailable`, `CompileFailed`; `OSError` for no such model.
    """
    try:
        from QEfficient import QEFFAutoModelForCausalLM
    except ImportError as error:
        raise CardUnavailable(f"QEfficient can't be imported: {error}") from error
    arguments = asdict(shapes) | asdict(options)
    lengths = list(arguments.pop("comp_ctx_lengths"))
    config: dict[str, object] = {}
    if lengths:
        config = {"qaic_config": {"ccl_enabled": True}}
        arguments |= {"comp_ctx_lengths_prefill": [*lengths], "comp_ctx_lengths_decode": [*lengths]}
        arguments["ctx_len"] += LENGTH_STEP
    model = QEFFAutoModelForCausalLM.from_pretrained(path, continuous_batching=True, **config)
    try:
        program = Path(model.compile(**arguments))
        return program, _context_lengths(model)
    except Exception as error:
        raise CompileFailed(f"{path} can't be compiled for {shapes} with {options}: {error}") from error


def _context_lengths(model: Any) -> ContextLengths:
    """Of one that has been compiled."""
    return ContextLengths(tuple(model.comp_ctx_lengths_prefill or ()), tuple(model.comp_ctx_lengths_decode or ()))


def open_on_card(program: Path, device_ids: Sequence[int] | None = None) -> Session:
    """`device_ids` are QIDs; without them the driver picks. Raises `CardUnavailable`."""
    try:
        from QEfficient.generation.cloud_infer import QAICInferenceSession

        session: Session = QAICInferenceSession(program, list(device_ids) if device_ids else None)
    except Exception as error:  # no SDK, no card, no free cores: each its own type
        raise CardUnavailable(f"no session on the card: {error}") from error
    return session
