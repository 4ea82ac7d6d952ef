"""The blend's core and its Hugging Face adapter need neither vLLM nor LMCache."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import kvarena.engines.blend, kvarena.reuse
for package in (kvarena.reuse, kvarena.engines.blend):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith("kvarena.reuse.lmcache_"):
            importlib.import_module(module.name)
assert "kvarena.reuse.selection.kv_deviation" in sys.modules and "kvarena.engines.blend.prefill" in sys.modules
print(sorted({name.partition(".")[0] for name in sys.modules} & {"vllm", "lmcache"}))
"""


def test_reuse_and_its_hugging_face_adapter_load_no_server() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
