"""What the measuring commands print."""

from __future__ import annotations

import pytest
from rich.table import Column

from kvarena.bench.console import console_for, new_table


@pytest.mark.parametrize("as_json", [False, True])
def test_a_row_is_a_line_where_a_file_keeps_it(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("Quality", Column("contender"), figures=[f"figure {number}" for number in range(9)])
    row = ["blend kv_deviation (deviation values) 10 % @3", *map(str, range(9))]
    table.add_row(*row)
    console_for(as_json).print(table)
    told = capsys.readouterr()
    lines = (told.err if as_json else told.out).splitlines()
    assert any(line.split() == " ".join(row).split() for line in lines)
