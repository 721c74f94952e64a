import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpm_cli.data import augment
from dpm_cli.data.augment import NO_CHANGE, draw_epoch
from dpm_cli.errors import DataError
from dpm_cli.recipe.sections import Augment

PIXELS = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crop_is_a_window_of_the_padded_image() -> None:
    offset = torch.tensor([[0, 0], [4, 4], [8, 8], [2, 7], [8, 0], [3, 3]])
    cropped = augment.crop(PIXELS, offset, padding=4)
    for image, (top, left), result in zip(PIXELS, offset.tolist(), cropped):
        padded = torch.zeros(3, 16, 16, dtype=torch.uint8)
        padded[:, 4:12, 4:12] = image
        assert torch.equal(result, padded[:, top : top + 8, left : left + 8])


def test_flip_mirrors_only_the_named_images() -> None:
    flipped = augment.flip(PIXELS, torch.tensor([True, False, True, False, False, False]))
    assert torch.equal(flipped[0, :, :, 0], PIXELS[0, :, :, 7])
    assert torch.equal(flipped[1], PIXELS[1])


def test_normalise_equals_its_formula() -> None:
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    images = augment.normalise(PIXELS, mean, std)
    expected = (PIXELS[2, 1].double() / 255 - 0.5) / 0.3
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[2, 1].double(), expected, rtol=1e-5, atol=1e-6)


@given(row=st.integers(0, 7), column=st.integers(0, 7), side=st.integers(1, 8))
def test_cutout_zeroes_exactly_a_square_clipped_at_the_border(row: int, column: int, side: int) -> None:
    cut = augment.cut_out_(torch.ones(1, 3, 8, 8), torch.tensor([[row, column]]), side)
    top, left = row - side // 2, column - side // 2
    expected = torch.ones(8, 8)
    expected[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    assert torch.equal(cut[0], expected.expand(3, 8, 8))


def test_whole_box_of_a_resized_crop_is_the_image() -> None:
    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(6, 4)
    torch.testing.assert_close(augment.resized_crop(PIXELS, whole), PIXELS.float(), rtol=0, atol=1e-2)


def test_resized_crop_of_a_ramp_is_a_ramp_between_the_box_borders() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).mul(20).expand(1, 1, 8, 8)  # 20 * column
    cropped = augment.resized_crop(ramp, torch.tensor([[1.0, 2.0, 5.0, 4.0]]))  # columns 2 to 6
    centres = 2 + (torch.arange(8) + 0.5) * 4 / 8 - 0.5
    torch.testing.assert_close(cropped[0, 0, 3], centres * 20, rtol=0, atol=1e-2)


@given(height=st.integers(1, 500), width=st.integers(1, 500), epoch=st.integers(0, 99))
def test_boxes_lie_inside_the_image_and_never_exceed_their_area(height: int, width: int, epoch: int) -> None:
    _, draws = draw_epoch(20, Augment(crop=0, resized_crop=True, flip=False), height=8, width=8, seed=0, epoch=epoch)
    assert draws.box is not None
    top, left, tall, wide = augment.find_boxes(draws.box, height, width).double().unbind(1)
    slack = 1e-4 * max(height, width)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= height + slack).all()
    assert (left + wide <= width + slack).all()
    assert (tall * wide <= height * width * (1 + 1e-4)).all()


def test_boxes_on_a_large_square_have_the_drawn_area_and_aspect() -> None:
    boxes = augment.find_boxes(torch.tensor([[0.25, math.log(4 / 3), 0.0, 0.999]]), 100, 100)[0]
    assert float(boxes[2] * boxes[3]) == pytest.approx(2500, rel=1e-4)
    assert float(boxes[3] / boxes[2]) == pytest.approx(4 / 3, rel=1e-4)


def test_every_draw_covers_its_range() -> None:
    changes = Augment(crop=2, flip=True, cutout=3)
    order, draws = draw_epoch(2000, changes, height=8, width=6, seed=0, epoch=0)
    assert draws.offset is not None
    assert draws.flipped is not None
    assert draws.hole is not None
    assert sorted(order.tolist()) == list(range(2000))
    assert draws.offset.unique().tolist() == [0, 1, 2, 3, 4]
    assert draws.hole[:, 0].unique().tolist() == list(range(8))
    assert draws.hole[:, 1].unique().tolist() == list(range(6))
    assert 0.45 < float(draws.flipped.float().mean()) < 0.55


@pytest.mark.parametrize("other", [(0, 1), (1, 0)])
def test_seed_and_epoch_both_change_the_order(other: tuple[int, int]) -> None:
    order, _ = draw_epoch(100, NO_CHANGE, height=8, width=8, seed=0, epoch=0)
    changed, _ = draw_epoch(100, NO_CHANGE, height=8, width=8, seed=other[0], epoch=other[1])
    assert not torch.equal(order, changed)


@pytest.mark.parametrize("changes", [Augment(crop=9, flip=False), Augment(crop=0, cutout=9, flip=False)])
def test_change_larger_than_the_image_is_refused(changes: Augment) -> None:
    with pytest.raises(DataError, match=r"data\.augment\.(crop|cutout) is 9 pixels; images of 8x12"):
        draw_epoch(4, changes, height=8, width=12, seed=0, epoch=0)
