"""Compiles cpu_kernels.cpp, once for each version of it: in the first server that needs it, or for an image by

    python3 -m kvarena.engines.vllm.build_kernels

which needs neither torch nor vLLM, nor the processor that they are for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FOLDER = "KVARENA_KERNELS"
"""The environment variable that says where the compiled kernels are; default: where vLLM keeps what it compiles."""
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)


def compiled() -> Path:
    """The kernels' library, compiled unless it is there. Raises `OSError` without a compiler or a place for it, and
    `CalledProcessError` where the compiler fails.
    """
    folder = Path(os.environ.get(FOLDER) or os.environ.get("VLLM_CACHE_ROOT") or "~/.cache/vllm").expanduser()
    described = SOURCE.read_bytes() + " ".join(FLAGS).encode()
    path = folder / f"cpu-kernels-{hashlib.sha256(described).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++, and no other compiler in CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / path.name
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(path)  # at once, for other workers may look for it
    return path


if __name__ == "__main__":
    print(compiled())
