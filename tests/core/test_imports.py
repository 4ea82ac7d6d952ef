"""The blend's core and its Hugging Face adapter need neither vLLM nor LMCache."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import kvarena.core, kvarena.engines.hf, kvarena.policies
for package in (kvarena.core, kvarena.policies, kvarena.engines.hf):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert "kvarena.core.blend" in sys.modules and "kvarena.engines.hf.blend" in sys.modules
print(sorted({name.partition(".")[0] for name in sys.modules} & {"vllm", "lmcache"}))
"""


def test_the_core_and_its_hugging_face_adapter_load_no_server() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
