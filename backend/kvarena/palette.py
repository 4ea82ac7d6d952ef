"""The colours of what is drawn, in pictures, reports and on the page. A name (a policy, a contender, a mode) has one
colour wherever it is drawn. They are told apart with red-green blindness, and stand out from a white and from a dark
page (3:1 or more). Draws nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

GREY, ORANGE, BLUE, GREEN = "#808691", "#C8480A", "#0068B5", "#009E73"
PURPLE, OCHRE, SKY, BROWN = "#A0408A", "#B58900", "#3D9BD2", "#8C564B"
PALETTE = (ORANGE, BLUE, GREEN, PURPLE, OCHRE, SKY, BROWN)
COLOURS = {
    "plain": GREY,
    "kv_deviation": ORANGE,
    "chunk_head": BLUE,
    "query_attention": GREEN,
    "random": PURPLE,
    "none": OCHRE,
    "all": SKY,
    "hf": BROWN,
}


def colours_of(names: Iterable[str], colours: Mapping[str, str] = COLOURS) -> dict[str, str]:
    """`colours`, and for names without one of their own those that no other of `names` has, while there are any."""
    names = list(dict.fromkeys(names))
    taken = {colours[name] for name in names if name in colours}
    free = [colour for colour in PALETTE if colour not in taken] or PALETTE
    others = [name for name in names if name not in colours]
    return {**colours, **dict(zip(others, itertools.cycle(free), strict=False))}
