"""Blind turns, and what votes say together: against closed forms, and against votes drawn from known strengths."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from chat import Chat, Context, Turn, Vote
from chat_file import ChatFile
from chat_view import blind_html
from contender_api import Sampling
from export import as_json, as_markdown
from figures import Figures
from runs import ChatStore
from settings import Contender
from votes import Ballot, ballot_of, fit, standings


def blind_turn(names: str = "ab", state: str = "done") -> Turn:
    turn = Turn.ask("Who?", Context(), [Contender(name, name.upper(), "http://x") for name in names], Sampling())
    turn.shuffle()
    for answer in turn.answers.values():
        answer.state = state  # type: ignore[assignment]
        answer.figures = Figures(first_token_ms=12.5, policy="kv_deviation", ratio=0.15)
    return turn


def ballots(sides: tuple[str, ...], ties: int = 0, bad: int = 0, **best: int) -> list[Ballot]:
    won = [Ballot(sides, "best", name) for name, number in best.items() for _ in range(number)]
    return won + [Ballot(sides, "tie")] * ties + [Ballot(sides, "bad")] * bad


def test_two_sides_have_the_closed_form() -> None:
    """Strengths of a Bradley-Terry model of two are their wins; the interval is that of log odds."""
    for wins, losses, ties in ((7, 3, 0), (1, 9, 0), (4, 4, 3), (5, 0, 1)):
        won, lost = wins + ties / 2, losses + ties / 2
        counts = {(("a", "b"), "a"): wins, (("a", "b"), "b"): losses, (("a", "b"), ""): ties}
        (share, _), (low, _), (high, _) = fit({key: float(n) for key, n in counts.items() if n}, ["a", "b"])
        assert share == pytest.approx(won / (won + lost), abs=1e-6)
        error = 1.96 * math.sqrt(1 / won + 1 / lost)
        assert low == pytest.approx(1 / (1 + lost / won * math.exp(error)), abs=1e-4)
        assert high == pytest.approx(1 / (1 + lost / won * math.exp(-error)), abs=1e-4)


def test_a_tie_is_half_a_vote_for_each_and_so_is_all_bad() -> None:
    (one,) = standings(ballots(("a", "b"), a=6, b=2, ties=1, bad=1))
    assert [(s.setting, s.num_votes, s.num_best, s.num_ties, s.num_bad) for s in one] == [
        ("a", 10, 6, 1, 1),
        ("b", 10, 2, 1, 1),
    ]
    assert one[0].share == pytest.approx((6 + 1 + 0.5) / 11)
    assert one[0].share + one[1].share == pytest.approx(1)


def test_a_side_that_won_every_vote_has_an_interval_that_narrows() -> None:
    few, many = (standings(ballots(("a", "b"), a=number))[0][0] for number in (3, 300))
    assert 0.5 < few.share < many.share < 1
    assert few.low < 0.5 < many.low < many.high < 1


def test_of_several_settings_known_strengths_are_found() -> None:
    rng = np.random.default_rng(0)
    strengths = {"a": 4.0, "b": 2.0, "c": 1.0}
    drawn = []
    for sides in (("a", "b"), ("b", "c"), ("a", "b", "c")):
        weights = np.array([strengths[side] for side in sides])
        drawn += [Ballot(sides, "best", str(one)) for one in rng.choice(sides, 2000, p=weights / weights.sum())]
    (group,) = standings(drawn)
    assert [one.setting for one in group] == ["a", "b", "c"]
    for one in group:
        rivals = [math.log(p) for name, p in strengths.items() if name != one.setting]
        odds = strengths[one.setting] / math.exp(sum(rivals) / len(rivals))
        assert one.low < odds / (1 + odds) < one.high
        assert one.high - one.low < 0.05


def test_settings_that_never_met_are_not_compared() -> None:
    groups = standings([*ballots(("a", "b"), a=1), *ballots(("c", "d"), d=1), *ballots(("b", "e"), e=1)])
    assert sorted(sorted(one.setting for one in group) for group in groups) == [["a", "b", "e"], ["c", "d"]]
    assert standings([]) == []


def test_sides_are_shuffled_and_a_vote_shows_them() -> None:
    assert {blind_turn("abc").order for _ in range(200)} == {
        tuple(order) for order in ("abc", "acb", "bac", "bca", "cab", "cba")
    }
    turn = blind_turn()
    assert turn.can_vote
    assert [side for side, _ in turn.sides()] == ["A", "B"]
    assert ballot_of(turn) is None
    turn.vote = Vote("best", "b")
    assert not turn.is_blind
    assert ballot_of(turn) == Ballot(("A, kv_deviation 15%", "B, kv_deviation 15%"), "best", "B, kv_deviation 15%")


def test_nothing_of_a_blind_side_tells_who_it_is() -> None:
    turn = blind_turn()
    turn.answers["a"].text = " <b>Ann</b>"
    shown = blind_html("A", turn.answers["a"], can_vote=True)
    assert "&lt;b&gt;Ann&lt;/b&gt;" in shown
    assert not [told for told in ("12.5", "kv_deviation", "approximate", "pane-a") if told in shown]
    turn.answers["a"].finish_reason = "length"
    assert "Cut at max tokens." in blind_html("A", turn.answers["a"], can_vote=True)
    assert "Ann" not in blind_html("A", turn.answers["a"], can_vote=False), "the first to come would tell"


@pytest.mark.parametrize(("state", "is_blind"), [("streaming", True), ("failed", False), ("interrupted", False)])
def test_without_two_whole_answers_there_is_no_vote(state: str, is_blind: bool) -> None:
    turn = blind_turn(state=state)
    assert (turn.is_blind, turn.can_vote) == (is_blind, False)


def test_one_answer_alone_is_not_blind() -> None:
    assert not blind_turn("a").order


def test_votes_are_kept_with_the_chat_exported_and_outlive_it(tmp_path: Path) -> None:
    file = ChatFile(tmp_path / "chats.db", max_chats=1)
    opened = ChatStore(file=file).new()
    opened.chat.turns += [blind_turn(), blind_turn()]
    opened.vote(0, Vote("best", "a"))
    opened.vote(0, Vote("tie"))
    opened.vote(1, Vote("bad"))
    told = ballot_of(opened.chat.turns[0])
    assert told
    assert told.best == "A, kv_deviation 15%", "the first vote counts"
    assert file.load(opened.chat.key, Chat) == opened.chat
    assert '"votes": [\n  {\n   "setting": "A, kv_deviation 15%"' in as_json(opened.chat)
    assert "- A, kv\\_deviation 15%: preferred 67% (" in as_markdown(opened.chat)
    assert "- vote: best a" in as_markdown(opened.chat)
    file.keep(Chat())
    assert file.load(opened.chat.key, Chat) is None
    assert [ballot.kind for ballot in file.ballots()] == ["best", "bad"]
    assert ballot_of(opened.chat.turns[0]) in file.ballots()
