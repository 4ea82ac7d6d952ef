"""What is to be seen in a result file: panels of lines or bars, as data.

Draws nothing and knows nothing of how figures were measured: `bench/plotting.py` draws panels with matplotlib for
pictures and reports, the page draws the same ones in the browser. A name (a policy, a contender, a mode) has one colour
and one marker wherever it is drawn; lines of one name differ by their dashes.
"""
