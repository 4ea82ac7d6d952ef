"""The radix tree and its budget, without tensors: payloads are the token ids themselves, so every answer is checked."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvarena.contenders.prefix.cache import Lease, PrefixCache, PrefixEntry

BYTES_PER_TOKEN = 10
TAIL_BYTES = 7


@dataclass(frozen=True)
class Tokens:
    """A segment that is its own proof."""

    ids: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return BYTES_PER_TOKEN * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, end: int) -> Tokens:
        return Tokens(self.ids[start:end])

    def copy(self) -> Tokens:
        return self


@dataclass(frozen=True)
class TailAfter:
    """A tail that knows what it comes after."""

    ids: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return TAIL_BYTES

    def copy(self) -> TailAfter:
        return self


Cache = PrefixCache[Tokens, TailAfter]


def test_get_looks_without_counting() -> None:
    cache: Cache = PrefixCache(min_tokens=20)
    ids = tuple(range(40))
    assert cache.get(ids) is None
    finish(cache.acquire(ids))
    whole, longer = cache.get(ids), cache.get((*ids, 99))
    assert whole == longer == PrefixEntry(40, (Tokens(ids),), TailAfter(ids))
    part = cache.get((*ids[:25], 99))
    assert part == PrefixEntry(25, (Tokens(ids[:25]),), None)
    assert cache.get(ids[:19]) is cache.get(ids, salt="other") is None
    assert (cache.stats().hits, cache.stats().misses) == (0, 1)
    cache.clear()
    assert cache.get(ids) is None


def finish(lease: Lease[Tokens, TailAfter]) -> bool:
    """As a request would: computes what isn't known and keeps it."""
    kept = lease.insert(Tokens(lease.token_ids[lease.num_tokens :]), TailAfter(lease.token_ids))
    lease.close()
    return kept


def ask(cache: Cache, ids: tuple[int, ...], salt: str = "") -> int:
    """A whole request; returns how many tokens were known."""
    lease = cache.acquire(ids, salt)
    check_lease(lease, ids)
    num_known = lease.num_tokens
    finish(lease)
    cache.check_integrity()
    return num_known


def check_lease(lease: Lease[Tokens, TailAfter], ids: tuple[int, ...]) -> None:
    assert tuple(token for segment in lease.segments for token in segment.ids) == ids[: lease.num_tokens]
    if lease.tail is not None:
        assert lease.tail.ids == ids[: lease.num_tokens]
    assert lease.num_tokens < len(ids) or lease.tail is not None


def ids(start: int, length: int) -> tuple[int, ...]:
    return tuple(range(start, start + length))


def test_a_repeat_is_known_whole_with_its_tail() -> None:
    cache = Cache(10_000, min_tokens=4)
    assert ask(cache, ids(0, 50)) == 0
    assert ask(cache, ids(0, 50)) == 50
    assert (cache.stats().hits, cache.stats().misses, cache.stats().tokens_saved) == (1, 1, 50)
    assert cache.stats().hit_rate == 0.5


def test_what_two_requests_share_is_kept_once() -> None:
    cache = Cache(10_000, min_tokens=4)
    shared = ids(0, 30)
    ask(cache, shared + ids(100, 10))
    assert ask(cache, shared + ids(200, 10)) == 30
    assert cache.num_bytes == 50 * BYTES_PER_TOKEN + 2 * TAIL_BYTES
    assert ask(cache, shared) == 29, "the last token is run again: nobody kept the logits there"
    assert ask(cache, shared) == 30
    assert cache.stats().cache_size == 3


def test_a_growing_conversation_pays_for_its_new_tokens() -> None:
    cache = Cache(100_000, min_tokens=4)
    for length in range(10, 200, 10):
        assert ask(cache, ids(0, length)) == max(0, length - 10) * (length > 10)


def test_short_prefixes_are_misses_and_short_prompts_are_not_kept() -> None:
    cache = Cache(10_000, min_tokens=20)
    ask(cache, ids(0, 19))
    assert cache.num_bytes == 0
    ask(cache, ids(0, 40))
    assert ask(cache, ids(0, 19) + ids(500, 30)) == 0
    assert ask(cache, ids(0, 20) + ids(600, 30)) == 20


def test_salts_know_nothing_of_each_other() -> None:
    cache = Cache(10_000, min_tokens=4)
    ask(cache, ids(0, 50), "a")
    assert ask(cache, ids(0, 50), "b") == 0
    assert ask(cache, ids(0, 50), "a") == 50


def test_least_recently_used_goes_first() -> None:
    room_for_three = 3 * (10 * BYTES_PER_TOKEN + TAIL_BYTES)
    cache = Cache(room_for_three, min_tokens=4)
    for start in (0, 100, 200):
        ask(cache, ids(start, 10))
    ask(cache, ids(0, 10))
    ask(cache, ids(300, 10))
    assert ask(cache, ids(0, 10)) == 10
    assert ask(cache, ids(100, 10)) == 0
    assert cache.stats().evictions >= 1


def test_what_is_too_large_is_not_kept_and_evicts_nothing() -> None:
    cache = Cache(500, min_tokens=4)
    ask(cache, ids(0, 40))
    assert not finish(cache.acquire(ids(1000, 60)))
    assert ask(cache, ids(0, 40)) == 40


def test_a_lease_keeps_its_prefix_from_eviction() -> None:
    cache = Cache(10 * BYTES_PER_TOKEN + TAIL_BYTES, min_tokens=4)
    ask(cache, ids(0, 10))
    held = cache.acquire(ids(0, 10))
    assert not finish(cache.acquire(ids(100, 10)))
    held.close()
    assert finish(cache.acquire(ids(100, 10)))
    cache.check_integrity()


def test_clear_leaves_running_requests_their_own() -> None:
    cache = Cache(10_000, min_tokens=4)
    ask(cache, ids(0, 20))
    lease = cache.acquire(ids(0, 30))
    cache.clear()
    assert (cache.num_bytes, cache.stats().num_nodes) == (0, 0)
    check_lease(lease, ids(0, 30))
    assert not finish(lease), "what stood before it is gone"
    cache.check_integrity()
    assert ask(cache, ids(0, 30)) == 0


def test_a_common_beginning_is_computed_once() -> None:
    cache = Cache(1_000_000, min_tokens=4)
    shared, started, known = ids(0, 50), threading.Barrier(8), []

    def request(number: int) -> None:
        started.wait()
        lease = cache.acquire(shared + ids(1000 * (number + 1), 10))
        known.append(lease.num_tokens)
        while cache.stats().waits < 7:
            time.sleep(0.001)
        finish(lease)

    threads = [threading.Thread(target=request, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(known) == [0] + [50] * 7
    assert cache.stats().waits == 7


def test_who_gives_up_lets_the_others_go_on() -> None:
    cache = Cache(10_000, min_tokens=4)
    first = cache.acquire(ids(0, 30))
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(ask(cache, ids(0, 30))))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    first.close()
    waiting.join(10)
    assert found == [0]


@pytest.mark.parametrize(
    "settings", [{"capacity_bytes": -1}, {"min_tokens": 0}, {"max_entries": 0}, {"max_age_seconds": 0}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Cache(**settings)


def test_the_number_of_whole_prefixes_is_bounded() -> None:
    cache = Cache(10_000, min_tokens=4, max_entries=3)
    for start in (0, 100, 200):
        ask(cache, ids(start, 10))
    assert ask(cache, ids(0, 10)) == 10, "now 100 is the one that wasn't used for longest"
    ask(cache, ids(300, 10))
    assert [ask(cache, ids(start, 10)) for start in (0, 200, 300)] == [10, 10, 10]
    assert (cache.stats().cache_size, cache.stats().evictions) == (3, 1)
    assert cache.num_bytes == 3 * (10 * BYTES_PER_TOKEN + TAIL_BYTES), "nothing is left of what was dropped"
    assert cache.get(ids(100, 10)) is None


def test_a_prefix_that_others_go_on_from_loses_its_tail_alone() -> None:
    cache = Cache(10_000, min_tokens=4, max_entries=1)
    ask(cache, ids(0, 10))
    assert ask(cache, ids(0, 20)) == 10
    assert cache.stats().cache_size == 1
    assert ask(cache, ids(0, 20)) == 20
    assert cache.num_bytes == 20 * BYTES_PER_TOKEN + TAIL_BYTES
    ask(cache, ids(100, 10))
    assert cache.num_bytes == 10 * BYTES_PER_TOKEN + TAIL_BYTES, "with the last of a branch all of it goes"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_too_old_is_a_miss_however_often_it_was_used() -> None:
    clock = Clock()
    cache = Cache(10_000, min_tokens=4, max_age_seconds=2, clock=clock)
    ask(cache, ids(0, 10))
    ask(cache, ids(100, 10))
    for clock.now_s in (1.0, 2.0):
        assert ask(cache, ids(0, 10)) == 10
    clock.now_s = 2.5
    assert cache.get(ids(0, 10)) is None
    assert ask(cache, ids(0, 10)) == 0
    assert ask(cache, ids(0, 10)) == 10, "it was kept anew"
    assert (cache.stats().expirations, cache.stats().evictions, cache.stats().cache_size) == (1, 0, 2)
    assert ask(cache, ids(100, 10)) == 0
    assert cache.stats().expirations == 2


def test_what_goes_on_from_a_prefix_keeps_it_young() -> None:
    clock = Clock()
    cache = Cache(10_000, min_tokens=4, max_age_seconds=2, clock=clock)
    ask(cache, ids(0, 10))
    clock.now_s = 1.5
    assert ask(cache, ids(0, 20)) == 10
    ask(cache, ids(0, 5) + ids(500, 5))  # splits it
    clock.now_s = 3.0
    assert ask(cache, ids(0, 20)) == 20
    clock.now_s = 4.0
    assert ask(cache, ids(0, 20)) == 0
    assert cache.stats().num_nodes == 1, "the others went with it"


def test_what_is_too_old_and_in_use_is_a_miss_for_others() -> None:
    clock = Clock()
    cache = Cache(10_000, min_tokens=4, max_age_seconds=2, clock=clock)
    ask(cache, ids(0, 10))
    with cache.acquire(ids(0, 20)) as lease:
        assert lease.insert(Tokens(ids(10, 10)), TailAfter(ids(0, 20)))
        clock.now_s = 3.0
        other = cache.acquire(ids(0, 10))
        assert other.num_tokens == 0
        check_lease(lease, ids(0, 20))
        assert finish(other)
    assert ask(cache, ids(0, 20)) == 10, "nothing stood on the rest"
    assert cache.stats().expirations == 1


def test_the_counts_under_the_originals_names() -> None:
    clock = Clock()
    cache = Cache(min_tokens=20, max_entries=1, max_age_seconds=2, clock=clock)
    for length in (30, 30):
        ask(cache, ids(0, length))
    ask(cache, ids(100, 30))
    clock.now_s = 3.0
    ask(cache, ids(100, 30))
    assert cache.get_stats() == {
        "size": 1,
        "hits": 1,
        "misses": 3,
        "hit_rate": 0.25,
        "total_requests": 4,
        "evictions_lru": 1,
        "evictions_ttl": 1,
        "cached_tokens_reused": 30,
    }


class RandomRequests(RuleBasedStateMachine):
    """Requests that overlap in time and in what they share, against a budget that is too small for them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Lease[Tokens, TailAfter]] = []

    @initialize(
        capacity=st.integers(0, 600),
        min_tokens=st.integers(1, 5),
        max_entries=st.none() | st.integers(1, 4),
        max_age=st.none() | st.integers(1, 10),
    )
    def make(self, capacity: int, min_tokens: int, max_entries: int | None, max_age: int | None) -> None:
        self.clock = Clock()
        self.cache = Cache(capacity, min_tokens, max_entries=max_entries, max_age_seconds=max_age, clock=self.clock)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    sequences = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)
    salts = st.sampled_from(["", "a"])

    @rule(tokens=sequences, salt=salts)
    def acquire(self, tokens: tuple[int, ...], salt: str) -> None:
        with self.cache._changed:
            if self.cache._is_being_computed(tokens, salt):
                return  # it would wait for one of the open leases
        lease = self.cache.acquire(tokens, salt)
        check_lease(lease, tokens)
        self.open.append(lease)

    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data: st.DataObject, keep: bool) -> None:
        if not self.open:
            return
        lease = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        check_lease(lease, lease.token_ids)
        finish(lease) if keep else lease.close()

    @rule(tokens=sequences, more=st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), salt=salts)
    def extend(self, tokens: tuple[int, ...], more: tuple[int, ...], salt: str) -> None:
        self.cache.insert(tokens + more, len(tokens), Tokens(more), TailAfter(tokens + more), salt)

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            for lease in self.open:
                check_lease(lease, lease.token_ids)


TestRandomRequests = RandomRequests.TestCase
TestRandomRequests.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_many_threads_and_a_small_budget() -> None:
    cache = Cache(3_000, min_tokens=3)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            tokens = tuple(rng.choices(range(3), k=rng.randint(1, 20)))
            lease = cache.acquire(tokens, rng.choice(["", "a"]))
            check_lease(lease, tokens)
            if rng.random() < 0.8:
                lease.insert(Tokens(tokens[lease.num_tokens :]), TailAfter(tokens))
            lease.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    cache.check_integrity()
    assert all(node.num_pins == 0 for node in cache._nodes())
