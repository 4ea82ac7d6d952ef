"""`kvarena ai100 demo`, under the name of Qualcomm's demonstration in a browser."""

import sys

from kvarena.cli import main

sys.argv[1:1] = ["ai100", "demo"]
main()
