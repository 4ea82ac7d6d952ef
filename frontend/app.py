"""KV Arena in the browser: `streamlit run frontend/app.py`. The frame around the pages in `views/`.

Their folder is not called `pages`: Streamlit would take it for pages without a frame when one is opened first.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st


def main() -> None:
    st.set_page_config(page_title="KV Arena", page_icon="⚔️", layout="wide")
    st.html(Path(__file__).with_name("style.css"))
    arena = st.Page("views/arena.py", title="Arena", icon=":material/swords:", default=True)
    quality = st.Page("views/quality.py", title="Quality", icon=":material/monitoring:")
    conversations = st.Page("views/conversations.py", title="Conversations", icon=":material/forum:")
    st.navigation([arena, conversations, quality], position="top").run()


main()
