"""`kvarena simllm demo`, under the name that Sim-LLM's demonstration has: `--demo_mode basic|similarity|benchmark`."""

import sys

from kvarena.cli import main

sys.argv[1:1] = ["simllm", "demo"]
main()
