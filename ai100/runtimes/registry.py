"""Runtimes by name."""

from __future__ import annotations

import logging
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import get_args

from ai100.runtimes import card
from ai100.runtimes.card import CardUnavailable, CompileOptions, compile_model, open_on_card
from ai100.runtimes.host import HostRuntime
from ai100.runtimes.model_files import ModelFiles
from ai100.runtimes.qefficient import QEfficientRuntime
from ai100.runtimes.runtime import Runtime, StaticShapes
from kvarena.contenders.ai100 import RuntimeName

RUNTIMES = get_args(RuntimeName)
DEFAULT_OPTIONS = CompileOptions()

log = logging.getLogger(__name__)


def open_runtime(
    name: str,
    path: str,
    shapes: StaticShapes,
    *,
    options: CompileOptions = DEFAULT_OPTIONS,
    device: str = "auto",
    dtype: str = "float32",
    random: bool = False,
) -> Runtime:
    """`auto` is the card where there is one (`card.missing`), else the host.

    `qaic` runs on the card, with `options`; `host` in PyTorch, with `device`, `dtype` and `random` of
    `HostRuntime.load`; `onnx` runs the card's code over the exported graph in ONNX Runtime.
    Raises `ValueError` for a name or setting that can't be, `CardUnavailable` with all that is missing,
    `CompileFailed`, and `OSError` when there is no such model.
    """
    if name not in RUNTIMES:
        raise ValueError(f"no runtime {name!r}; choose one of {', '.join(RUNTIMES)}")
    name = chosen(name)
    if name == "host":
        return HostRuntime.load(path, shapes, device, dtype, random)
    if random:
        raise ValueError(f"runtime {name!r} has no random weights; only 'host' has")
    return _open_qaic(path, shapes, options) if name == "qaic" else _open_onnx(path, shapes)


def chosen(name: str) -> str:
    """What `auto` is on this machine; every other name is itself. Logs why it isn't the card."""
    if name != "auto":
        return name
    lacking = card.missing()
    if lacking:
        log.info("runtime host, for this machine lacks %s", "; ".join(lacking))
    return "host" if lacking else "qaic"


def _open_qaic(path: str, shapes: StaticShapes, options: CompileOptions) -> Runtime:
    if lacking := card.missing():
        raise CardUnavailable(f"runtime 'qaic' needs {'; '.join(lacking)}. Runtime 'host' needs none of it")
    files = ModelFiles.read(path)
    files.check(shapes)
    program, lengths = compile_model(path, shapes, options)
    devices = range(options.num_devices) if options.num_devices > 1 else None
    return QEfficientRuntime(partial(open_on_card, program, devices), files, shapes, context_lengths=lengths)


def _open_onnx(path: str, shapes: StaticShapes) -> Runtime:
    try:
        from ai100.runtimes.onnx_session import OnnxSession, export
    except ImportError as error:
        raise ValueError(f"runtime 'onnx' needs the packages of kvarena[ai100]: {error}") from error
    files = ModelFiles.read(path)
    files.check(shapes)
    folder = tempfile.TemporaryDirectory(prefix="kvarena-graph-")
    graph = export(path, Path(folder.name))
    runtime = QEfficientRuntime(partial(OnnxSession, graph, shapes), files, shapes, name="onnx")
    weakref.finalize(runtime, folder.cleanup)
    return runtime
