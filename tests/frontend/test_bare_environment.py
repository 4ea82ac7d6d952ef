"""The page starts where only its own requirements are installed: it talks HTTP, and needs no engine."""

from __future__ import annotations

import pytest

from support.bare_environment import ROOT, absent_modules, run_without

START = """
from streamlit.testing.v1 import AppTest
page = AppTest.from_file("frontend/app.py", default_timeout=60).run()
assert not page.exception, page.exception
assert "Contenders" in [heading.value for heading in page.sidebar.subheader]
"""
OPEN_MEASURE = """
page.switch_page("views/measure.py").run()
assert not page.exception, page.exception
(said,) = page.warning
assert said.value.startswith("Measuring needs packages that are not installed beside this page: "), said.value
(install,) = page.code
assert install.value.startswith(f"{sys.executable} -m pip install "), install.value
assert not page.multiselect and not page.number_input and not page.text_input, "no form that can do nothing"
assert not [button for button in page.button if button.key == "measure-start"]
"""


@pytest.mark.timeout(120)
def test_the_page_starts_where_nothing_else_is_installed() -> None:
    lines = (ROOT / "frontend" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [".[ui]"]
    absent = absent_modules("ui")
    assert {"torch", "vllm", "transformers", "lmcache", "fastapi", "scipy", "matplotlib"} <= set(absent)
    run = run_without(absent, START + OPEN_MEASURE)
    assert run.returncode == 0, run.stderr
