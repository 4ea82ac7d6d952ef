"""Compiles a model for the card through QEfficient, and opens a session on it. QEfficient is imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ai100.runtimes.runtime import StaticShapes
from ai100.runtimes.session import Session


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
