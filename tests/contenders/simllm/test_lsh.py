"""Hashes and probing on random embeddings, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.contenders.simllm.similarity import NUM_PROBES
from kvarena.simllm import LSHIndex

DIM = 48


def filled(embeddings: torch.Tensor, num_hyperplanes: int = 16) -> LSHIndex:
    index = LSHIndex(embeddings.shape[1], num_hyperplanes)
    for number, embedding in enumerate(embeddings):
        index.add(str(number), embedding)
    return index


def differing_bits(one: str, other: str) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("num_hyperplanes", [1, 7, 16, 64])
def test_the_hash_of_a_batch_is_the_hash_of_each(num_hyperplanes: int) -> None:
    index = LSHIndex(DIM, num_hyperplanes)
    embeddings = torch.randn(500, DIM, generator=torch.Generator().manual_seed(0))
    hashes = index.compute_hash_batch(embeddings)
    assert hashes == [index.compute_hash(embedding) for embedding in embeddings]
    assert {len(one) for one in hashes} == {num_hyperplanes}
    assert len(set(hashes)) == (2 if num_hyperplanes == 1 else len(set(hashes)))
    assert LSHIndex(DIM, num_hyperplanes).compute_hash_batch(embeddings) == hashes
    assert index.compute_hash_batch(3 * embeddings) == hashes, "only the direction counts"


def test_another_seed_has_other_hyperplanes() -> None:
    embeddings = torch.randn(50, DIM)
    assert LSHIndex(DIM, seed=1).compute_hash_batch(embeddings) != LSHIndex(DIM, seed=2).compute_hash_batch(embeddings)


def test_bits_differ_as_often_as_the_angle_says() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 3000, DIM, generator=generator)
    near = one + 0.5 * other
    index = LSHIndex(DIM)
    pairs = zip(index.compute_hash_batch(one), index.compute_hash_batch(near), strict=True)
    share = sum(differing_bits(*pair) for pair in pairs) / (3000 * 16)
    angles = torch.cosine_similarity(one, near).acos()
    assert share == pytest.approx(float(angles.mean()) / torch.pi, rel=0.05)


@pytest.mark.parametrize("flipped", [1, 2, 4])
def test_what_differs_in_few_bits_is_found(flipped: int) -> None:
    """A neighbour on the other side of the hyperplanes that the query is nearest to."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(DIM, generator=generator, dtype=torch.float64)
    index = filled(torch.randn(2000, DIM, generator=generator))
    hyperplanes = torch.from_numpy(index._hyperplanes)
    crossed = hyperplanes[(hyperplanes @ query).abs().argsort()[:flipped]]
    near = query - 1.1 * torch.linalg.pinv(crossed) @ (crossed @ query)
    differing = differing_bits(index.add("near", near), index.compute_hash(query))
    assert flipped <= differing <= flipped + 1
    assert index.neighbours(query, max_keys=5)[0] == "near"


def test_its_bucket_is_probed_first() -> None:
    embeddings = torch.randn(6000, DIM, generator=torch.Generator().manual_seed(3))
    index = filled(embeddings, 7)
    hashes = index.compute_hash_batch(embeddings)
    probed = [hashes[int(key)] for key in index.neighbours(embeddings[17], max_keys=6000)]
    assert len(set(probed)) == NUM_PROBES, "of 128 buckets"
    assert len(probed) == index.num_candidates < 6000
    assert probed.count(hashes[17]) == hashes.count(hashes[17])
    assert differing_bits(hashes[17], "".join("10"[bit == "1"] for bit in hashes[17])) == 7
    assert "".join("10"[bit == "1"] for bit in hashes[17]) not in probed, "the opposite bucket is the last"


def test_more_hyperplanes_leave_fewer_candidates() -> None:
    """At 100 tasks, the default size of the cache, among which each query has a neighbour at a cosine of 0.8."""
    generator = torch.Generator().manual_seed(7)
    embeddings, noise = torch.randn(2, 100, 128, generator=generator)
    candidates, probes, found = [], [], []
    for num_hyperplanes in (4, 6, 8, 16, 32):
        index = filled(embeddings, num_hyperplanes)
        near = [index.neighbours(query) for query in embeddings + 0.75 * noise]
        candidates.append(index.num_candidates / 100)
        probes.append(index.num_probes / 100)
        found.append(sum(str(number) in keys for number, keys in enumerate(near)))
    assert candidates[0] == found[0] == 100, "16 buckets, all of them probed"
    assert candidates == sorted(candidates, reverse=True)
    assert candidates[-1] == NUM_PROBES, "one in each bucket"
    assert probes[0] == 16, "as many as there are"
    assert probes[-1] == NUM_PROBES
    assert min(found) >= 98


@pytest.mark.parametrize(("similarity", "least_recall"), [(0.998, 1.0), (0.95, 0.99), (0.85, 0.8)])
def test_recall_on_clusters(similarity: float, least_recall: float) -> None:
    """For most queries there is one among the found that is as similar as the most similar of 6,000."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(300, 128, generator=generator)
    embeddings = centres.repeat(20, 1) + 0.3 * torch.randn(6000, 128, generator=generator)
    index = filled(embeddings)
    noise = (1 / similarity**2 - 1) ** 0.5 * torch.randn(200, 128, generator=generator)
    num_found = 0
    for query in embeddings[:200] + noise * (1 + 0.3**2) ** 0.5:
        similarities = torch.cosine_similarity(query[None], embeddings)
        found = [float(similarities[int(key)]) for key in index.neighbours(query)]
        num_found += max(found, default=-1) >= float(similarities.max()) - 0.02
    assert num_found / 200 >= least_recall


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_random_additions_and_removals(operations: list[tuple[bool, int]]) -> None:
    index, expected = LSHIndex(4, 8), dict[str, str]()
    embeddings = torch.randn(21, 4, generator=torch.Generator().manual_seed(5))
    for is_addition, number in operations:
        key = str(number)
        if is_addition:
            expected[key] = index.add(key, embeddings[(number * 7) % 21])
        elif key in expected:
            del expected[key]
            index.remove(key)
        index.check_integrity()
        assert set(index.neighbours(embeddings[0])) <= set(expected)
        assert index._hashes == expected


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.zeros(DIM + 1), rf"\({DIM},\), not \({DIM + 1},\)"),
        (torch.zeros(2, DIM), rf"\({DIM},\), not \(2, {DIM}\)"),
        (torch.full((DIM,), float("nan")), f"{DIM} finite numbers"),
        (torch.full((DIM,), float("inf")), f"{DIM} finite numbers"),
    ],
)
def test_what_isnt_an_embedding_is_refused(embedding: torch.Tensor, message: str) -> None:
    index = LSHIndex(DIM)
    for use in (index.compute_hash, index.neighbours):
        with pytest.raises(ValueError, match=message):
            use(embedding)


@pytest.mark.parametrize(("arguments", "message"), [((0,), "embedding_dim"), ((4, 0), "from 1 to 64"), ((4, 65), "65")])
def test_bad_sizes_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSHIndex(*arguments)
