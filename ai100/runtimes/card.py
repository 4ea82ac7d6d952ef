"""The card: is there a Cloud AI 100 that this machine can use; compile a model for it; run slots in a session on it.

The places looked at are those of Qualcomm's SDK, as QEfficient knows them (COMPILER in
QEfficient/utils/constants.py, cloud_infer.py, device_utils.py). QEfficient is imported only here.

A session holds a compiled graph on a device, and between runs the graph's retained state: every `past_*` input, whose
next value is the output of the same name plus `_RetainedState`. `Session` is the part of QEfficient's
`QAICInferenceSession` that is used (QEfficient/generation/cloud_infer.py). It is injected, so that `QEfficientRuntime`
runs over ONNX Runtime too (`onnx_session.py`). Not here: QEfficient's own decode loop, which is greedy only and writes
into the slots of idle rows.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ai100.runtimes.runtime import DeviceLost, Logits, ModelFiles, Runtime, SlotRange, StaticShapes

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


Buffers = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ContextLengths:
    """Over how many positions a run can attend, in ascending order; none: over all `ctx_len`, however few are filled.
    They are the shapes of the graph's input `comp_ctx_lengths`."""

    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()

    def check(self, ctx_len: int) -> None:
        """Raises `ValueError` where one doesn't reach to the end."""
        for name, lengths in (("prefill", self.prefill), ("decode", self.decode)):
            if lengths and lengths[-1] < ctx_len:
                raise ValueError(f"{name} attends over {lengths[-1]} positions at most, and ctx_len is {ctx_len}")


class Session(Protocol):
    """One thread at a time."""

    @property
    def input_names(self) -> Sequence[str]: ...

    @property
    def output_names(self) -> Sequence[str]: ...

    def skip_buffers(self, skipped_buffer_names: list[str]) -> None:
        """These stay on the device: they are neither given nor given back."""

    def set_buffers(self, buffers: Buffers) -> None:
        """Sets inputs, and the shapes of outputs."""

    def run(self, inputs: Buffers) -> Buffers:
        """Every failure is an exception, of many types; the retained state is lost with it."""

    def deactivate(self) -> None:
        """Gives the device back."""


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
        prefill, decode = model.comp_ctx_lengths_prefill, model.comp_ctx_lengths_decode
        return program, ContextLengths(tuple(prefill or ()), tuple(decode or ()))
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


NOWHERE = -1
"""The position of padding and of idle rows: what they compute is written into no slot, and their logits mean
nothing."""
WIPING_TOKEN = 0


ALL_OF_THE_CONTEXT = ContextLengths()


class QEfficientRuntime(Runtime):
    """`Runtime` over a session. `open_session` opens one with empty slots, at the start and after each loss.

    Once a run has failed, what the device holds is unknown, whatever the reason was: that is a lost device.
    """

    def __init__(
        self,
        open_session: Callable[[], Session],
        files: ModelFiles,
        shapes: StaticShapes,
        name: str = "qaic",
        context_lengths: ContextLengths = ALL_OF_THE_CONTEXT,
    ) -> None:
        """Raises what `open_session` raises, and `ValueError` for context lengths that end before `ctx_len`."""
        super().__init__(files, shapes)
        context_lengths.check(shapes.ctx_len)
        self._context_lengths = context_lengths
        self.name = name
        self._open_session = open_session
        self.session: Session | None = None
        """None while the device is lost or closed."""
        self._open()

    def clear(self, slot: int) -> None:
        """Overwrites what the slot held: a host has no other hand on one slot of the device."""
        self._opened()
        step = self.shapes.prefill_seq_len
        num_tokens = self._filled.num_touched(slot)
        for position in range(0, num_tokens, step):
            self.prefill(slot, [WIPING_TOKEN] * min(step, num_tokens - position), position)
        self._filled.empty(slot)

    def reopen(self) -> None:
        self.close()
        try:
            self._open()
        except Exception as error:
            raise DeviceLost(f"the device doesn't come back: {error}") from error

    def close(self) -> None:
        session, self.session = self.session, None
        self._filled.empty_all()
        if session is not None:
            with suppress(Exception):  # a lost device can't be given back properly
                session.deactivate()

    def _open(self) -> None:
        self.session = session = self._open_session()
        names = [*session.input_names, *session.output_names]
        session.skip_buffers([name for name in names if name.startswith("past_")])

    def _run(self, token_ids: Sequence[Sequence[int]], written: Sequence[SlotRange], *, decodes: bool) -> Logits:
        """Padded to the compiled shape, over the shortest compiled context that has all positions."""
        session, shapes, context_lengths = self._opened(), self.shapes, self._context_lengths.prefill
        batch_size, seq_len = shapes.prefill_batch_size, shapes.prefill_seq_len
        if decodes:
            context_lengths, batch_size, seq_len = self._context_lengths.decode, shapes.full_batch_size, 1
        inputs = padded_inputs(token_ids, written, batch_size, seq_len)
        if context_lengths:
            end = max(row.end for row in written)
            length = next(length for length in context_lengths if length >= end)
            inputs["comp_ctx_lengths"] = np.zeros(length, dtype=np.int64)
        try:
            session.set_buffers({"logits": np.zeros((batch_size, 1, self.vocab_size), dtype=np.float32)})
            logits = session.run(inputs)["logits"]
        except Exception as error:
            self.close()
            raise DeviceLost(f"the device is lost: {error or type(error).__name__}") from error
        self._filled.touch(written)
        self._filled.fill(written)
        return np.array(logits[: len(written), 0], dtype=np.float32)

    def _opened(self) -> Session:
        if self.session is None:
            raise DeviceLost("the device is lost or closed; reopen it")
        return self.session


def padded_inputs(
    token_ids: Sequence[Sequence[int]], written: Sequence[SlotRange], batch_size: int, seq_len: int
) -> Buffers:
    """`input_ids` and `position_ids` `(batch_size, seq_len)`, `batch_index` `(batch_size, 1)`, all int64.

    Padding and idle rows are at NOWHERE; idle rows get slots of their own, so that no slot stands in a batch twice.
    """
    input_ids = np.zeros((batch_size, seq_len), dtype=np.int64)
    position_ids = np.full((batch_size, seq_len), NOWHERE, dtype=np.int64)
    for number, (row, tokens) in enumerate(zip(written, token_ids, strict=True)):
        input_ids[number, : len(tokens)] = tokens
        position_ids[number, : len(tokens)] = np.arange(row.start, row.end)
    busy = [row.slot for row in written]
    idle = [slot for slot in range(batch_size) if slot not in busy]
    batch_index = np.array((busy + idle)[:batch_size], dtype=np.int64)[:, None]
    return {"input_ids": input_ids, "position_ids": position_ids, "batch_index": batch_index}
