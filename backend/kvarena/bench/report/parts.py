"""What a page is made of: sections by topic, in each a block for every file that has something to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarena.bench.panels import Panel
from kvarena.bench.report.files import ResultFile
from kvarena.bench.report.tables import Table
from kvarena.bench.series import Styles


@dataclass(frozen=True)
class Part:
    """Figures and tables of one file on one topic."""

    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Topic:
    """`make` takes a file of one of these `benchmarks`; none means every file."""

    anchor: str
    title: str
    intro: str
    make: Callable[[ResultFile, Styles], Part]
    benchmarks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Block:
    """A part as it goes into the page: each figure is a title and an `<svg>` element."""

    file: ResultFile
    figures: Sequence[tuple[str, str]]
    tables: Sequence[Table]
