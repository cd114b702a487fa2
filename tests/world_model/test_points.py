"""Points: told by the marginals of a heat map, drawn as stamps; what moves in the picture moves in the code."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from world_model.parts.nets import to_blocks
from world_model.parts.points import Distances, PointDecoder, PointEncoder

FRAME = (3, 64, 64)


def encoder(points: int = 3, cells: int = 32) -> PointEncoder:
    torch.manual_seed(0)
    return PointEncoder(FRAME, 16, points, cells, 10)


def test_logits_are_the_marginals_of_the_maps() -> None:
    """Against the joint distribution over all cells, written out."""
    made, frame = encoder(), torch.rand(2, *FRAME)
    logits = made(frame)[:, : 3 * 2 * 32].unflatten(-1, (3, 2, 32))
    blocks = torch.nn.functional.pixel_unshuffle(frame, 4)
    joint = (4 * torch.nn.functional.pixel_shuffle(made.seen(blocks), 2)).flatten(2).softmax(-1).unflatten(-1, (32, 32))
    assert_close(logits[:, :, 0].softmax(-1), joint.sum(-2))  # columns: over the rows
    assert_close(logits[:, :, 1].softmax(-1), joint.sum(-1))


@pytest.mark.parametrize(("across", "down"), [(8, 0), (0, 12), (4, 8)])
def test_a_thing_that_moves_moves_its_cells(across: int, down: int) -> None:
    made = encoder()
    with torch.no_grad():
        made.seen[0].weight.abs_()  # type: ignore[operator]  # sees brightness
    here, there = torch.zeros(1, *FRAME), torch.zeros(1, *FRAME)
    here[..., 24:28, 20:24] = 1
    there[..., 24 + down : 28 + down, 20 + across : 24 + across] = 1
    cells = [made(frame)[:, : 3 * 2 * 32].unflatten(-1, (3, 2, 32)).log_softmax(-1) for frame in (here, there)]
    moved = (across // 2, down // 2)
    for axis in (0, 1):
        before, after = cells[0][0, :, axis], cells[1][0, :, axis]
        assert_close(after[:, 8 + moved[axis] : 20 + moved[axis]], before[:, 8:20])


def test_the_same_stamp_is_drawn_everywhere() -> None:
    torch.manual_seed(0)
    made = PointDecoder(FRAME, 16, 1, 32, 10)

    def drawn(column: int, row: int) -> torch.Tensor:
        code = torch.zeros(1, 74)
        code[0, column] = code[0, 32 + row] = 1
        return made(code) - made.rest(torch.zeros(1, 10))

    here, there = drawn(10, 12), drawn(13, 20)
    assert here.abs().max() > 0.1
    assert_close(there[..., 20:60, 10:50], here[..., 4:44, 4:44], atol=1e-5, rtol=1e-4)
    rows, columns = here[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (17, 32, 13, 28)  # 16 x 16 pixels about (25, 21)


def test_blocks_are_those_of_pixel_unshuffle() -> None:
    frame = torch.randn(2, 3, 5, 32, 48)[:, :, :3]
    blocks = to_blocks(frame)
    assert torch.equal(blocks, torch.nn.functional.pixel_unshuffle(frame.flatten(0, 1), 4))
    assert blocks.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_blocks(frame), blocks.bfloat16())


@pytest.mark.parametrize("frame", [(1, 96, 48), (3, 32, 32), (1, 80, 160), (3, 84, 64), (3, 112, 80), (1, 210, 160)])
def test_any_frame_has_the_same_number_of_cells(frame: tuple[int, int, int]) -> None:
    made = PointEncoder(frame, 8, 2, 16, 5)
    assert made(torch.rand(4, *frame)).shape == (4, 2 * 2 * 16 + 5)
    assert PointDecoder(frame, 8, 2, 16, 5)(torch.rand(4, 69)).shape == (4, *frame)


def test_distances_are_the_same_wherever_both_points_are() -> None:
    made = Distances(3, 32)

    def told(*places: tuple[int, int]) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(torch.tensor(places).flatten(), 32).float()  # (2 M, K)
        return made(one_hot.expand(5, -1, -1))

    here, there, other = told((3, 4), (6, 4), (20, 9)), told((8, 14), (11, 14), (25, 19)), told((3, 4), (7, 4), (20, 9))
    assert here.shape == (5, made.size) and made.size == 3 * 2 * 13
    assert_close(here, there)
    bins = here[0].unflatten(0, (3, 2, 13))  # pairs, across and down, bins about 0
    assert bins[0, 1].argmax() == 6, "the first two points are on one row"
    assert bins[0, 0].argmax() < 6, "the first is left of the second"
    assert not torch.equal(here[0, :26], other[0, :26]), "one cell more is seen where things are near"
