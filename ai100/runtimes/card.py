"""Is there a Cloud AI 100 that this machine can use? The places are those of Qualcomm's SDK, as QEfficient knows them
(COMPILER in QEfficient/utils/constants.py, cloud_infer.py, device_utils.py).
"""

from __future__ import annotations

import platform
import subprocess
from importlib.util import find_spec
from pathlib import Path

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
