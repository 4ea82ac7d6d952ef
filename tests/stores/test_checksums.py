"""A piece's checksum: whatever happens to a piece, it is another piece then."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kvarena.core.plan import Chunk, as_token_ids
from kvarena.core.store import Scores
from kvarena.stores.lmcache_context import PieceChecksum, piece_names

SHAPE = (2, 3, 32, 32)
NAME = 2**64 - 5


def sealed(seed: int, dtype: torch.dtype = torch.bfloat16, name: int = NAME) -> torch.Tensor:
    piece = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    PieceChecksum(SHAPE, dtype).seal(piece, name)
    return piece


def swap(piece: torch.Tensor, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    kept = piece[one].clone()
    piece[one] = piece[other]
    piece[other] = kept


DAMAGE: dict[str, Callable[[torch.Tensor], object]] = {
    "one bit": lambda piece: piece[1, 2, 7].view(torch.uint8)[9].bitwise_xor_(1),
    "the sign of the last": lambda piece: piece[-1, -1, -2, -1:].neg_(),
    "a value that isn't a number": lambda piece: piece[0, 1, 2, 3:4].fill_(float("nan")),
    "a token without values": lambda piece: piece[:, :, 4].zero_(),
    "nothing": lambda piece: piece.zero_(),
    "two tokens": lambda piece: swap(piece, (0, 0, 3), (0, 0, 4)),
    "two layers": lambda piece: swap(piece, (0, 0), (0, 1)),
    "keys and values": lambda piece: swap(piece, (0,), (1,)),
    "two halves of a word": lambda piece: swap(piece, (0, 0, 0, 0), (0, 0, 0, 1)),
    "the checksum": lambda piece: piece[0, 0, -1].zero_(),
    "beside the checksum": lambda piece: piece[1, 0, -1, 5:6].add_(1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_damage_is_noticed(damage: str, dtype: torch.dtype) -> None:
    checksum, piece = PieceChecksum(SHAPE, dtype), sealed(0, dtype)
    assert checksum.is_sound(piece, NAME)
    before = piece.clone()
    DAMAGE[damage](piece)
    assert not torch.equal(piece.view(torch.uint8), before.view(torch.uint8))
    assert not checksum.is_sound(piece, NAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_come_back_to_within_five_percent(dtype: torch.dtype) -> None:
    checksum, piece = PieceChecksum(SHAPE, dtype), sealed(0, dtype)
    assert checksum.scores_in(piece, 31) is None
    kept = piece[:, :, :-1].clone()
    scores = Scores(torch.logspace(-5, 3, 40).view(20, 2), 3)
    checksum.seal(piece, NAME, scores)
    assert checksum.is_sound(piece, NAME)
    assert torch.equal(piece[:, :, :-1], kept)
    found = checksum.scores_in(piece, 20)
    assert found is not None
    assert found.num_prompts == 3
    torch.testing.assert_close(found.mean, scores.mean, rtol=0.05, atol=0)
    own = piece[1, 0, -1].view(torch.uint8)
    own[0] -= 128
    assert checksum.scores_in(piece, 20) is None, "an earlier version's, of one score for each token"
    own[0] += 128
    own[5] ^= 1
    assert not checksum.is_sound(piece, NAME), "damaged scores are damage"
    checksum.seal(piece, NAME)
    assert checksum.scores_in(piece, 20) is None


def test_a_row_without_room_has_no_scores() -> None:
    shape = (2, 3, 32, 8)
    checksum, piece = PieceChecksum(shape, torch.bfloat16), torch.randn(shape).bfloat16()
    checksum.seal(piece, NAME, Scores(torch.ones(31, 2), 1))
    assert checksum.is_sound(piece, NAME)
    assert checksum.scores_in(piece, 31) is None


def test_a_sound_piece_in_anothers_place_is_noticed() -> None:
    checksum = PieceChecksum(SHAPE, torch.bfloat16)
    assert checksum.is_sound(sealed(1, name=7), 7)
    assert not checksum.is_sound(sealed(1, name=7), 8)
    assert not checksum.is_sound(sealed(1)[:, :, :31], NAME)
    assert not checksum.is_sound(sealed(1, torch.float16), NAME)


def test_it_is_the_same_on_every_machine() -> None:
    """What one version has stored, the next one has to find."""
    piece = torch.arange(math.prod(SHAPE)).view(SHAPE).to(torch.float32)
    PieceChecksum(SHAPE, torch.float32).seal(piece, NAME)
    assert piece[0, 0, -1].view(torch.int64)[0] == -2698762562334457861
    assert piece_names("model", Chunk(as_token_ids(range(40)), "salt"), 31) == [
        13339585712515565722,
        6840172850971612673,
    ]


def test_sealing_leaves_the_tokens_alone_and_works_in_a_larger_tensor() -> None:
    whole = torch.randn(2, 3, 64, 32).bfloat16()
    before = whole.clone()
    checksum = PieceChecksum(SHAPE, torch.bfloat16)
    for number, piece in enumerate(whole.split(32, dim=2)):
        checksum.seal(piece, number)
        assert checksum.is_sound(piece, number)
        assert torch.equal(piece[:, :, :31], before[:, :, number * 32 : number * 32 + 31])


def test_pieces_are_named_by_owner_salt_and_everything_before() -> None:
    chunk = Chunk(as_token_ids(range(80)))
    names = piece_names("model", chunk, 31)
    assert len(set(names)) == 3
    longer = Chunk(as_token_ids([*range(62), 99]))
    assert piece_names("model", longer, 31)[:2] == names[:2], "they begin alike"
    moved = Chunk(as_token_ids([*range(31, 62), *range(31)]))
    others = [("model", moved), ("model", Chunk(chunk.token_ids, "salt")), ("other", chunk)]
    assert not set(names) & {name for owner, of in others for name in piece_names(owner, of, 31)}
