"""Draws the vote on a blind turn, and what all votes say."""

from __future__ import annotations

import streamlit as st

import state
from chat import Chat, Turn, Vote
from runs import OpenChat
from votes import Ballot, ballots_of, standings

LABELS = {"tie": "Tie", "bad": "All bad"}


def vote_text(turn: Turn, vote: Vote) -> str:
    found = (f"{side}, {answer.contender.title}" for side, answer in turn.sides() if answer.contender.name == vote.best)
    return next(found, LABELS.get(vote.kind, vote.best))


def draw_ballot(opened: OpenChat, index: int) -> None:
    """Which side is best; the first vote shows who answered."""
    turn = opened.chat.turns[index]
    choices = [(f"{side} is best", Vote("best", answer.contender.name)) for side, answer in turn.sides()]
    choices += [(LABELS["tie"], Vote("tie")), (LABELS["bad"], Vote("bad"))]
    with st.container(horizontal=True, key=f"vote-{index}"):
        for number, (label, vote) in enumerate(choices):
            st.button(label, key=f"vote-{index}-{number}", on_click=opened.vote, args=[index, vote])


def draw_tally(chat: Chat) -> None:
    """Of all votes that are kept, of which none says whose chat it was given in; of this chat's where none are."""
    if not (ballots := kept_ballots(chat)):
        return
    with st.popover(f"Votes: {len(ballots)}", key="votes", icon=":material/how_to_vote:"):
        st.caption("Blind votes on this page. Preferred: how likely the answer is taken to be better than a rival's.")
        for group in standings(ballots):
            st.table(
                [
                    {
                        "setting": one.setting,
                        "preferred": f"{one.share:.0%} ({one.low:.0%} to {one.high:.0%})",
                        "votes": one.num_votes,
                        "best": one.num_best,
                        "tie": one.num_ties,
                        "all bad": one.num_bad,
                    }
                    for one in group
                ]
            )


def kept_ballots(chat: Chat) -> list[Ballot]:
    file = state.chat_file()
    return ballots_of(chat) if file.problem else file.ballots()
