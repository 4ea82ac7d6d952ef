"""What is written out of the policies' dataclasses is current."""

from __future__ import annotations

import pytest

from kvarena.stack.generate import COMMAND, SECTIONS, generated
from kvarena.stack.home import project_root


def test_the_generated_files_are_current() -> None:
    stale = [path.name for path, text in generated(project_root()).items() if path.read_text() != text]
    assert not stale, f"run {COMMAND}"


def test_a_section_that_was_lost_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"compose.yaml has no section between '# >>> policies: \.\.\.' and"):
        next(one for one in SECTIONS if (one.path, one.name) == ("compose.yaml", "policies")).in_text("services:\n")
