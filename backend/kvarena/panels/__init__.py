"""What a result file shows, as data: panels of lines or bars.

Draws nothing and doesn't know how figures were measured. `bench/plotting.py` draws panels with matplotlib, for pictures
and reports; the page draws the same ones in the browser.
"""
