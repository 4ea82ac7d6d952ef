"""The slot table against a plain model of it: whose a slot is, what is in it, and who goes first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ai100.slots import Slot, SlotKey, SlotTable

NUM_SLOTS, CTX_LEN = 3, 12
NUM_SHARED = ASIDE = NUM_SLOTS - 1
KEYS = [SlotKey(salt, conversation, topic) for salt in ("", "s") for conversation in "ab" for topic in "xy"]
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=CTX_LEN)


def taken(table: SlotTable, key: SlotKey | None) -> Slot:
    found = table.take(key)
    assert found is not None
    return found.slot


class AnyUse(RuleBasedStateMachine):
    """`kept`: what each topic left behind; `order`: keys by their last taking, the least recent first. The last slot is
    set aside for turns without a topic.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(NUM_SLOTS, CTX_LEN)
        self.held: list[Slot] = []
        self.kept: dict[SlotKey, list[int]] = {}
        self.order: list[SlotKey] = []

    @property
    def num_full(self) -> int:
        """Of the slots that topics share: those with a topic, or in use for a turn without one."""
        return len(self.kept) + sum(slot.key is None and slot.index != ASIDE for slot in self.held)

    def push_out_the_oldest(self) -> None:
        oldest = next(key for key in self.order if key not in [slot.key for slot in self.held])
        self.order.remove(oldest)
        del self.kept[oldest]

    @rule(key=st.sampled_from(KEYS))
    def take(self, key: SlotKey) -> None:
        held = [slot.key for slot in self.held]
        found = self.table.take(key)
        in_use = [slot for slot in self.held if slot.index != ASIDE]
        if key in held or (key not in self.kept and len(in_use) == NUM_SHARED):
            assert found is None
            return
        assert found is not None
        assert found.is_new == (key not in self.kept)
        assert found.slot.index != ASIDE
        if found.is_new and self.num_full == NUM_SHARED:
            self.push_out_the_oldest()
        assert found.slot.token_ids == self.kept.setdefault(key, [])
        self.order = [*(other for other in self.order if other != key), key]
        self.held.append(found.slot)

    @rule()
    def take_for_one_turn(self) -> None:
        has_room, num_evictions = self.table.has_room(None), self.table.num_evictions
        found = self.table.take(None)
        assert has_room == (found is not None)
        assert self.table.num_evictions == num_evictions, "it pushes out no topic"
        is_aside_in_use = ASIDE in [slot.index for slot in self.held]
        if is_aside_in_use and self.num_full == NUM_SHARED:
            assert found is None
            return
        assert found is not None
        assert found.is_new
        assert found.slot.token_ids == []
        assert is_aside_in_use == (found.slot.index != ASIDE)
        self.held.append(found.slot)

    @rule()
    def take_for_a_turn_that_nobody_finds_again(self) -> None:
        has_room, is_full = self.table.has_room(None, evicts=True), self.num_full == NUM_SHARED
        is_aside_in_use = ASIDE in [slot.index for slot in self.held]
        in_use = [slot for slot in self.held if slot.index != ASIDE]
        found = self.table.take(None, evicts=True)
        assert has_room == (found is not None)
        if is_aside_in_use and len(in_use) == NUM_SHARED:
            assert found is None
            return
        assert found is not None
        assert found.is_new
        assert found.slot.token_ids == []
        assert is_aside_in_use == (found.slot.index != ASIDE)
        if is_aside_in_use and is_full:
            self.push_out_the_oldest()
        self.held.append(found.slot)

    @precondition(lambda self: self.held)
    @rule(ids=IDS, at=st.integers(0, 9))
    def run_a_prompt(self, ids: list[int], at: int) -> None:
        slot = self.held[at % len(self.held)]
        before = list(slot.token_ids)
        count = self.table.reuse(slot, ids)
        assert ids[:count] == before[:count]
        assert count == len(ids) - 1 or count == len(before) or ids[count] != before[count]
        self.table.extend(slot, ids[count:])
        self.table.set_pending(slot, 7)
        assert (slot.token_ids, slot.position, slot.pending) == (ids, len(ids), 7)
        if slot.key is not None:
            self.kept[slot.key] = ids

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 9))
    def give_back(self, at: int) -> None:
        self.table.give_back(self.held.pop(at % len(self.held)))

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 9))
    def forget(self, at: int) -> None:
        slot = self.held.pop(at % len(self.held))
        if slot.key is not None:
            del self.kept[slot.key]
            self.order.remove(slot.key)
        self.table.forget(slot)

    @rule()
    def forget_all(self) -> None:
        self.table.forget_all()
        self.held, self.kept, self.order = [], {}, []

    @invariant()
    def it_is_what_it_should_be(self) -> None:
        self.table.check_integrity()
        assert {slot.key: slot.token_ids for slot in self.table.rows() if slot.key} == self.kept
        assert {slot.index for slot in self.table.rows() if slot.in_use} == {slot.index for slot in self.held}


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_slot_in_use_is_never_given_away() -> None:
    table = SlotTable(3, CTX_LEN)
    first, _ = taken(table, KEYS[0]), taken(table, KEYS[1])
    assert table.take(KEYS[2]) is None
    assert table.take(KEYS[0]) is None, "its own turn waits too"
    table.give_back(first)
    assert taken(table, KEYS[2]).index == first.index
    assert table.num_evictions == 1


def test_the_least_recently_used_goes_first_and_empty_slots_before_it() -> None:
    table = SlotTable(2, CTX_LEN, sets_aside=False)
    for key in KEYS[:2]:
        table.give_back(taken(table, key))
    table.give_back(taken(table, KEYS[0]))
    slot = taken(table, KEYS[2])
    assert slot.index == 1
    table.forget(slot)
    assert taken(table, KEYS[3]).index == 1, "it is empty"
    assert {row.key for row in table.rows()} == {KEYS[0], KEYS[3]}


def test_turns_without_a_slot_of_their_own_push_out_no_topic() -> None:
    table = SlotTable(3, CTX_LEN)
    for key in KEYS[:4]:
        table.give_back(taken(table, None))
        table.give_back(taken(table, key))
    assert {row.key for row in table.rows()} == {None, *KEYS[2:4]}
    assert table.num_evictions == 2, "topics share the other two"
    first = taken(table, None)
    assert table.take(None) is None, "it waits, for the topics' slots are full"
    table.give_back(first)
    assert taken(table, None).index == first.index


def test_the_first_turn_without_a_slot_of_its_own_pushes_out_no_topic_of_a_full_table() -> None:
    table = SlotTable(3, CTX_LEN)
    for key in KEYS[:2]:
        slot = taken(table, key)
        table.extend(slot, [1, 2])
        table.give_back(slot)
    assert [row.key for row in table.rows()] == [*KEYS[:2], None]
    first = taken(table, None)
    assert first.is_aside
    assert not table.has_room(None), "the next one waits"
    assert table.has_room(KEYS[2]), "topics go on"
    table.give_back(first)
    assert [row.key for row in table.rows()] == [*KEYS[:2], None]
    assert table.num_evictions == 0
    assert [table.reuse(taken(table, key), [1, 2, 3]) for key in KEYS[:2]] == [2, 2], "nothing of theirs is lost"


def test_turns_that_nobody_finds_again_push_out_topics_only_where_nothing_is_empty() -> None:
    table = SlotTable(3, CTX_LEN)
    for key in KEYS[:2]:
        table.give_back(taken(table, key))
    for _ in range(5):
        table.give_back(taken(table, None))
    assert [row.key for row in table.rows()] == [*KEYS[:2], None]
    table.take(None, evicts=True)
    second = table.take(None, evicts=True)
    assert second is not None, "it doesn't wait"
    assert second.slot.index == 0, "the least recently used topic's"
    table.give_back(second.slot)
    assert taken(table, KEYS[2]).index == 0, "it is the first to go"
    assert table.num_evictions == 1


def test_without_a_slot_that_is_set_aside_topics_have_all() -> None:
    """As in a chat that has no other turns; and a single slot serves both."""
    table = SlotTable(3, CTX_LEN, sets_aside=False)
    for key in KEYS[:3]:
        table.give_back(taken(table, key))
    assert [row.key for row in table.rows()] == KEYS[:3]
    single = SlotTable(1, CTX_LEN)
    for held in (KEYS[0], None, KEYS[0]):
        single.give_back(taken(single, held))
    assert single.rows()[0].key == KEYS[0]


def test_nothing_of_the_context_is_passed() -> None:
    table = SlotTable(1, CTX_LEN)
    slot = taken(table, KEYS[0])
    table.extend(slot, [1] * CTX_LEN)
    with pytest.raises(ValueError, match=str(CTX_LEN)):
        table.extend(slot, [1])
    table.check_integrity()


def test_a_slot_that_nobody_holds_is_nobodys_to_change() -> None:
    table = SlotTable(1, CTX_LEN)
    slot = taken(table, KEYS[0])
    table.give_back(slot)
    with pytest.raises(AssertionError, match="slot 0"):
        table.extend(slot, [1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: setattr(t.slots[1], "key", t.slots[0].key), "two slots"),
        (lambda t: t.slots[2].token_ids.append(1), "nobody"),
        (lambda t: t.slots[0].token_ids.extend([1] * 20), "longer"),
        (lambda t: setattr(t.slots[0], "last_used", 99), "future"),
        (lambda t: t.slots.reverse(), "moved"),
        (lambda t: setattr(t.slots[2], "key", KEYS[3]), "set aside"),
    ],
)
def test_check_integrity_really_checks(damage: object, says: str) -> None:
    table = SlotTable(3, CTX_LEN)
    taken(table, KEYS[0])
    table.check_integrity()
    assert callable(damage)
    damage(table)
    with pytest.raises(AssertionError, match=says):
        table.check_integrity()
