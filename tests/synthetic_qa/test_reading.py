"""What "the same" means: the one named last, in whatever order the chunks stand."""

from __future__ import annotations

from kvarena.synthetic_qa.facts import Claim, Fact, Reference, Sentence, read_chunks

BRUNO, VERA = Reference("person", "Bruno"), Reference("person", "Vera")
BEES = Sentence("Bruno keeps bees.", (Claim("animals", BRUNO, "bees"),), (BRUNO,))
TEA = Sentence("Vera drinks tea.", (Claim("drink", VERA, "tea"),), (VERA,))
LUTE = Sentence("The same person plays the lute.", (Claim("instrument", Reference("person"), "lute"),))
IBIS = Sentence(
    "People call Bruno the Ibis.", (Claim("nickname", Reference("nickname", "Ibis"), BRUNO),), (BRUNO,)
)  # fmt: skip
WEAVER = Sentence(
    "The Ibis is a weaver.",
    (Claim("trade", Reference("nickname", "Ibis"), "weaver"),),
    (Reference("nickname", "Ibis"),),
)
ELMGATE = Sentence("Now to Elmgate.", (), (Reference("street", "Elmgate"),))
ROOM = Sentence("Vera rents a room here.", (Claim("room", VERA, Reference("street")),), (VERA,))


def test_the_same_person_is_the_one_named_last() -> None:
    assert read_chunks([(TEA, BEES), (LUTE,)]).facts[-1] == Fact(BRUNO, "instrument", "lute", (0, 1), "person")
    assert read_chunks([(BEES, TEA), (LUTE,)]).facts[-1] == Fact(VERA, "instrument", "lute", (0, 1), "person")
    assert read_chunks([(BEES, LUTE)]).facts[-1].chunks == (0,)


def test_without_an_earlier_chunk_nobody_knows() -> None:
    assert read_chunks([(LUTE,), (BEES,)]).facts == [Fact(BRUNO, "animals", "bees", (1,))]
    assert read_chunks([(ROOM,)]).facts == []
    assert read_chunks([(WEAVER,), (IBIS,)]).facts == [Fact(Reference("nickname", "Ibis"), "nickname", "Bruno", (1,))]


def test_a_nickname_stands_for_a_person() -> None:
    facts = read_chunks([(IBIS,), (TEA,), (WEAVER,)]).facts
    assert facts[-1] == Fact(BRUNO, "trade", "weaver", (0, 2), "nickname")


def test_behind_a_nickname_the_same_person_is_unclear() -> None:
    assert len(read_chunks([(IBIS, WEAVER), (LUTE,)]).facts) == 2


def test_here_is_the_street_named_last() -> None:
    assert read_chunks([(ELMGATE, BEES), (TEA,), (ROOM,)]).facts[-1] == Fact(VERA, "room", "Elmgate", (0, 2), "street")
