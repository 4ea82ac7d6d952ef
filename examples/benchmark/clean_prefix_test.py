"""`kvarena bench prefix`, under the name of the original's benchmark: no server needed."""

import sys

from kvarena.cli import main

sys.argv[1:1] = ["bench", "prefix"]
main()
