"""Long documents on the page, over the real stack: dropped, split, their KV filled, asked about with reuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import FilePayload, Locator, Page, expect

from support.page_steps import ask, expect_states, figures, num_reused, pane, settle
from support.pdf_files import pdf_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

NOTES = Path(__file__).resolve().parents[3] / "backend" / "models" / "town" / "notes"
FILL_MS = 180_000


def town_text() -> str:
    """The town's notes as one text: long for a page, and in words that the small model has tokens for."""
    return "\n\n".join(path.read_text().strip() for path in sorted(NOTES.glob("[0-9a-z]*.txt")))


def upload(page: Page, name: str) -> Locator:
    return page.locator(f'[data-testid="upload"][data-document="{name}"]')


def test_dropped_documents_are_chunks_with_their_kv(page: Page) -> None:
    text = town_text()
    settle(page)
    files: list[FilePayload] = [
        {"name": "the town.txt", "mimeType": "text/plain", "buffer": text.encode()},
        {"name": "the town.md", "mimeType": "text/markdown", "buffer": f"# The town\n\n{text[-2500:]}".encode()},
        {"name": "the town.pdf", "mimeType": "application/pdf", "buffer": pdf_of([text[:2500], text[2500:5000]])},
        {"name": "broken.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7"},
    ]
    page.locator('[data-testid="stFileUploader"] input[type="file"]').set_input_files(files)
    for kind in ("txt", "md", "pdf"):
        expect(upload(page, f"the town.{kind}")).to_have_attribute("data-state", "filled", timeout=FILL_MS)
    expect(upload(page, "broken.pdf")).to_have_attribute("data-state", "problem")
    expect(upload(page, "broken.pdf")).to_contain_text("a broken PDF")

    settle(page)
    picks = page.get_by_role("button", name="Only this", exact=True)
    expect(picks).to_have_count(3)
    picks.last.click()
    first = page.get_by_test_id("chunk").first
    expect(first).to_have_attribute("data-chunk", "the town.pdf 01", timeout=30_000)
    names = [chunk.get_attribute("data-chunk") for chunk in page.get_by_test_id("chunk").all()]
    assert len(names) > 1
    assert all(re.fullmatch(r"the town\.pdf \d\d", name or "") for name in names)
    settle(page)
    ask(page, "What does everybody keep?")
    expect_states(page, blend="done", plain="done")
    blend = figures(page, "blend")
    num_tokens = blend["num_prompt_tokens"] or 0
    assert num_reused(blend) + (blend["num_recomputed_tokens"] or 0) > 0.8 * num_tokens
    expect(pane(page, "blend")).to_contain_text("approximate")
