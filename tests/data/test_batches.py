import pytest
import torch
from torch import Tensor

from dpm_cli.data import Images
from dpm_cli.data.augment import NO_CHANGE
from dpm_cli.recipe.sections import Augment

EVERYTHING = Augment(crop=2, flip=True, cutout=3)


def make_images(count: int = 50) -> Images:
    pixels = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Images(pixels, torch.arange(count), torch.tensor([0.5]), torch.tensor([0.25]))


def collect(images: Images, batch: int = 8, seed: int = 3, epoch: int = 2, **options: object) -> list[list[Tensor]]:
    settings = {"augment": EVERYTHING} | options
    return [list(each) for each in images.batches(batch, seed=seed, epoch=epoch, **settings)]  # type: ignore[arg-type]


def test_evaluation_is_in_order_unchanged_and_normalised() -> None:
    images = make_images()
    batches = collect(images, augment=None)
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(50))
    expected = (images.pixels.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.cat([pixels for pixels, _ in batches]), expected)


@pytest.mark.parametrize("changes", [EVERYTHING, Augment(crop=0, flip=True, resized_crop=True)])
def test_same_seed_and_epoch_give_the_same_bits(changes: Augment) -> None:
    first, second = collect(make_images(), augment=changes), collect(make_images(), augment=changes)
    assert all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))
    other = collect(make_images(), augment=changes, epoch=4)
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("start", [1, 3, 6, 7, 100])
def test_start_yields_the_tail_of_the_uninterrupted_epoch(start: int) -> None:
    whole, tail = collect(make_images()), collect(make_images(), start=start)
    assert len(tail) == max(0, len(whole) - start)
    assert all(torch.equal(a, b) for one, two in zip(whole[start:], tail) for a, b in zip(one, two))


def test_an_image_is_changed_alike_in_batches_of_any_size() -> None:
    def by_label(batch: int) -> dict[int, Tensor]:
        return {int(y): x for xs, ys in collect(make_images(), batch=batch) for x, y in zip(xs, ys)}

    small, large = by_label(7), by_label(50)
    assert all(torch.equal(small[label], large[label]) for label in range(50))


def test_every_image_comes_once_an_epoch_in_a_new_order() -> None:
    labels = [torch.cat([y for _, y in collect(make_images(), epoch=epoch)]) for epoch in (0, 1)]
    assert all(sorted(each.tolist()) == list(range(50)) for each in labels)
    assert not torch.equal(labels[0], labels[1])


def test_last_smaller_batch_is_kept_unless_dropped() -> None:
    assert [len(y) for _, y in collect(make_images(), batch=20)] == [20, 20, 10]
    assert [len(y) for _, y in collect(make_images(), batch=20, drop_last=True)] == [20, 20]
    assert [len(y) for _, y in collect(make_images(), batch=20, drop_last=True, start=1)] == [20]


def test_drawing_batches_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    collect(make_images())
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_that_changes_nothing_only_shuffles() -> None:
    images = make_images()
    pixels, labels = collect(images, batch=50, augment=NO_CHANGE)[0]
    plain, _ = collect(images, batch=50, augment=None)[0]
    assert torch.equal(pixels, plain[labels])
    assert not torch.equal(labels, torch.arange(50))


def test_split_without_images_has_no_batches() -> None:
    empty = make_images().select(torch.arange(0))
    assert len(empty) == 0
    assert collect(empty) == collect(empty, augment=None) == []


@pytest.mark.gpu
def test_gpu_yields_what_the_cpu_yields() -> None:
    there = make_images().to(torch.device("cuda"))
    for (pixels, labels), (expected, numbers) in zip(collect(there), collect(make_images()), strict=True):
        assert torch.equal(labels.cpu(), numbers)
        torch.testing.assert_close(pixels.cpu(), expected)
