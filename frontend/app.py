"""KV Arena in the browser: `streamlit run frontend/app.py`. The frame around the pages in `views/`.

The folder isn't called `pages`: Streamlit would then show its files without this frame when one is opened first.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st
from streamlit.delta_generator_singletons import context_dg_stack, get_default_dg_stack_value

import state


def main() -> None:
    # If a click comes while a fragment of the sidebar runs, Streamlit 1.67 runs the script in the same thread and would
    # draw the whole page into the sidebar.
    context_dg_stack.set(get_default_dg_stack_value())
    st.set_page_config(page_title="KV Arena", page_icon="⚔️", layout="wide")
    st.html(Path(__file__).with_name("style.css"))
    if state.is_big_screen():
        st.html(Path(__file__).with_name("big_screen.css"))
    for name in ("keys.js", "follow.js"):
        st.html(f"<script>{Path(__file__).with_name(name).read_text()}</script>", unsafe_allow_javascript=True)
    arena = st.Page("views/arena.py", title="Arena", icon=":material/swords:", default=True)
    quality = st.Page("views/quality.py", title="Quality", icon=":material/monitoring:")
    conversations = st.Page("views/conversations.py", title="Conversations", icon=":material/forum:")
    measure = st.Page("views/measure.py", title="Measure", icon=":material/timer:")
    st.navigation([arena, measure, conversations, quality], position="top").run()
    with st.sidebar:
        st.toggle(
            "Big screen",
            **state.linked(state.BIG_SCREEN),
            help="Large type, readable from the back of a room.",
        )


main()
