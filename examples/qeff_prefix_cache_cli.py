"""`kvarena ai100 chat`, under the name of Qualcomm's demonstration of contextual KV."""

import sys

from kvarena.cli import main

sys.argv[1:1] = ["ai100", "chat"]
main()
