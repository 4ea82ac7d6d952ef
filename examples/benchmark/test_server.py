"""`kvarena bench prefix --url http://127.0.0.1:8000`, under the name of the original's test of a running server."""

import sys

from kvarena.cli import main

sys.argv[1:1] = ["bench", "prefix", "--url", "http://127.0.0.1:8000"]
main()
