from collections.abc import Callable

import pytest
import torch

from dpm_cli.data import Images, Splits
from dpm_cli.data import digits as bundled
from dpm_cli.data.digits import read_digits
from dpm_cli.errors import DataError

Load = Callable[..., Splits]


def rows(images: object) -> set[bytes]:
    assert isinstance(images, Images)
    return {bytes(image.flatten().tolist()) for image in images.pixels}


def test_digits_are_the_1797_of_uci() -> None:
    train, test = read_digits()
    assert (len(train), len(test)) == (1442, 355)
    first = torch.tensor([0, 0, 5, 13, 9, 1, 0, 0]) * 255 / 16  # of the first row of the first image, a zero
    assert torch.equal(train.pixels[0, 0, 0], first.round().to(torch.uint8))
    assert int(train.labels[0]) == 0
    assert torch.cat([train.labels, test.labels]).bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert train.pixels.min() == 0
    assert train.pixels.max() == 255


def test_statistics_of_digits_are_those_of_the_training_images() -> None:
    train, _ = read_digits()
    pixels = train.pixels.double() / 255
    assert bundled.MEAN[0] == pytest.approx(float(pixels.mean()), abs=5e-5)
    assert bundled.STD[0] == pytest.approx(float(pixels.std(correction=0)), abs=5e-5)


def test_splits_of_digits_are_disjoint_and_complete(load: Load) -> None:
    splits = load("digits", shape=(1, 8, 8), classes=10, validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1298, 144, 355)
    train, held, test = rows(splits.train), rows(splits.validation), rows(splits.test)
    assert not train & held
    assert not (train | held) & test


def test_seed_moves_validation_but_never_the_test_images(load: Load) -> None:
    one, two = (load("digits", shape=(1, 8, 8), classes=10, seed=seed) for seed in (0, 1))
    assert rows(one.test) == rows(two.test)
    assert rows(one.validation) != rows(two.validation)
    assert rows(one.validation) | rows(one.train) == rows(two.validation) | rows(two.train)


def test_validation_of_nothing_is_empty(load: Load) -> None:
    splits = load("digits", shape=(1, 8, 8), classes=10, validation=0)
    assert (len(splits.train), len(splits.validation)) == (1442, 0)
    assert list(splits.validation.batches(8, seed=0, epoch=0, augment=None)) == []


def test_limit_takes_a_seeded_subset_before_validation(load: Load) -> None:
    small, again, other = (
        load("digits", shape=(1, 8, 8), classes=10, limit=100, validation=0.25, seed=seed) for seed in (0, 0, 1)
    )
    assert (len(small.train), len(small.validation), len(small.test)) == (75, 25, 355)
    assert rows(small.train) == rows(again.train)
    assert rows(small.train) != rows(other.train)


def test_digits_fit_a_colour_model_of_another_size(load: Load) -> None:
    splits = load("digits", shape=(3, 32, 32), classes=10)
    images, _ = next(splits.train.batches(4, seed=0, epoch=0, augment=None))
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert splits.mean == bundled.MEAN * 3


def test_statistics_of_the_recipe_replace_the_datasets_own(load: Load) -> None:
    splits = load("digits", shape=(1, 8, 8), classes=10, mean=(0.0,), std=(1.0,))
    assert isinstance(splits.train, Images)
    images, _ = next(splits.train.batches(4, seed=0, epoch=0, augment=None))
    torch.testing.assert_close(images, splits.train.pixels[:4].float() / 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 9}, "digits .* has 10 classes but model.classes is 9"),
        ({"shape": (2, 8, 8)}, "model.input has 2 channels; images of digits give 1 .* or 3"),
        ({"mean": (0.1, 0.2)}, "data.mean has 2 values; model.input has 1 channels"),
        ({"std": ()}, "data.std has 0 values; model.input has 1 channels"),
        ({"validation": 0.9999}, "data.validation 0.9999 leaves none of 1442 training images"),
        ({"memory_limit": 1000}, "digits at 1x8x8 takes 115008 bytes; data.memory_limit is 1000"),
    ],
)
def test_settings_that_do_not_fit_digits_are_refused(load: Load, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("digits", **({"shape": (1, 8, 8), "classes": 10} | changes))
