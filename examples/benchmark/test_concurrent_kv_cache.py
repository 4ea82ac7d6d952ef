"""`kvarena bench prefix --levels "no KV cache,KV cache"`, under the name of the original's benchmark.

As there, the requests come one after the other.
"""

import sys

from kvarena.cli import main

sys.argv[1:1] = ["bench", "prefix", "--levels", "no KV cache,KV cache"]
main()
