"""PDF files with text, as matplotlib writes them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

LINE_CHARS = 80


def pdf_of(pages: Sequence[str]) -> bytes:
    """One page for each text, wrapped to lines; an empty text makes a page with a picture and no text."""
    import matplotlib as mpl
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    target = io.BytesIO()
    with mpl.rc_context({"pdf.fonttype": 42}), PdfPages(target) as pdf:
        for text in pages:
            figure = Figure(figsize=(8.27, 11.69))
            if text:
                figure.text(0.05, 0.97, "\n".join(textwrap.wrap(text, LINE_CHARS)), va="top", fontsize=8)
            else:
                figure.add_axes((0, 0, 1, 1)).axis("off")
            pdf.savefig(figure)
    return target.getvalue()


def encrypted(data: bytes, password: str) -> bytes:
    from pypdf import PdfWriter

    writer = PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt(password, algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()
