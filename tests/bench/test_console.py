"""What the measuring commands print."""

from __future__ import annotations

import pytest

from kvarena.bench.console import console_for, table_of


@pytest.mark.parametrize("as_json", [False, True])
def test_a_row_is_a_line_where_a_file_keeps_it(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {f"figure {number}": str(number) for number in range(9)}
    row = ["blend kv_deviation (deviation values) 10 % @3", *figures.values()]
    table = table_of("Quality", [{"label": row[0]}], {"contender": "{label}"}, figures, min_width=14)
    console_for(as_json).print(table)
    told = capsys.readouterr()
    lines = (told.err if as_json else told.out).splitlines()
    assert any(line.split() == " ".join(row).split() for line in lines)
