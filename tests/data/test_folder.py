import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

import dpm_cli.data.load as loading
from dpm_cli.data import Images, Splits, Streamed
from dpm_cli.data.decode import decode
from dpm_cli.errors import DataError
from dpm_cli.layers.images import Framing
from dpm_cli.recipe.sections import Augment

Load = Callable[..., Splits]


def in_memory(split: object) -> Images:
    assert isinstance(split, Images)
    return split


def first_batch(split: Any, augment: Augment | None = None, batch: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(split.batches(batch, seed=1, epoch=1, augment=augment)))


def test_folder_holds_the_pixels_of_its_files(load: Load, folder: Path) -> None:
    splits = load("folder", root=folder)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 6, 12)
    assert splits.names == ("a", "b", "c")
    assert not splits.test_held_out
    expected = np.asarray(Image.open(folder / "test" / "b" / "001.png")).transpose(2, 0, 1)
    assert np.array_equal(in_memory(splits.test).pixels[5].numpy(), expected)
    assert in_memory(splits.test).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_validation_and_training_images_are_disjoint(load: Load, folder: Path) -> None:
    splits = load("folder", root=folder)
    train, held = (
        {bytes(x.flatten().tolist()) for x in in_memory(s).pixels} for s in (splits.train, splits.validation)
    )
    assert not train & held
    assert len(train | held) == 30


def test_val_serves_as_test_folder(load: Load, folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load("folder", root=folder).test) == 12


def test_classes_alone_give_a_tenth_to_the_test_whatever_the_seed(load: Load, folder: Path) -> None:
    one, two = (load("folder", root=folder / "train", seed=seed, validation=0) for seed in (0, 1))
    assert one.test_held_out
    assert (len(one.train), in_memory(one.test).labels.tolist()) == (27, [0, 1, 2])
    assert torch.equal(in_memory(one.test).pixels, in_memory(two.test).pixels)


def test_without_labels_any_folder_of_images_serves(load: Load, folder: Path) -> None:
    splits = load("folder", root=folder, labels=False, classes=1000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 6, 0)
    assert not splits.labelled
    flat = folder.parent / "flat"
    flat.mkdir()
    for path in folder.glob("train/*/*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    found = load("folder", root=flat, labels=False, validation=0)
    labelled = load("folder", root=folder, validation=0)
    assert torch.equal(in_memory(found.train).pixels, in_memory(labelled.train).pixels)
    assert not found.test_held_out


def test_without_labels_a_folder_without_images_is_refused(load: Load, folder: Path) -> None:
    for root in (folder.parent / "nowhere", folder.parent / "empty"):
        (folder.parent / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="holds no images"):
            load("folder", root=root, labels=False)


def test_images_below_a_class_count_and_hidden_or_foreign_files_do_not(load: Load, folder: Path) -> None:
    class_folder = folder / "test" / "a"
    (class_folder / "more").mkdir()
    (class_folder / "000.png").rename(class_folder / "more" / "z.PNG")
    (class_folder / "._001.png").write_bytes(b"left by macOS")
    (class_folder / "notes.txt").write_text("not an image")
    (folder / "test" / ".ipynb_checkpoints").mkdir()
    assert len(load("folder", root=folder).test) == 12


def test_image_is_scaled_by_its_short_side_and_cropped_at_the_centre(tmp_path: Path) -> None:
    stripes = np.zeros((10, 40, 3), dtype=np.uint8)
    stripes[:, 15:25] = 200  # the central square
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    assert (decode(str(tmp_path / "wide.png"), Framing((3, 10, 10))) == 200).all()
    assert decode(str(tmp_path / "wide.png"), Framing((1, 5, 5))).shape == (1, 5, 5)


ODD_SIZES = [(61, 47), (47, 61), (224, 224), (333, 255), (300, 1000), (640, 479)]


def save_noise(path: Path, size: tuple[int, int]) -> Path:
    """size: width and height."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 32, 24)], ids=str)
def test_resize_is_that_of_torchvision(tmp_path: Path, size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    path = save_noise(tmp_path / "picture.png", size)
    usual = Compose([Resize(36), CenterCrop(shape[1:])])(Image.open(path))
    decoded = decode(str(path), Framing(shape, resize=36))
    assert np.array_equal(decoded, np.asarray(usual).transpose(2, 0, 1))


@pytest.mark.thorough
def test_resize_of_a_line_of_pixels_is_bounded(tmp_path: Path) -> None:
    path = save_noise(tmp_path / "line.png", (1, 60_000))
    assert decode(str(path), Framing((3, 32, 32), resize=4096)).shape == (3, 32, 32)


def test_without_a_crop_the_whole_image_is_squeezed(tmp_path: Path) -> None:
    halves = np.zeros((10, 40, 3), dtype=np.uint8)
    halves[:, 20:] = 200
    Image.fromarray(halves).save(tmp_path / "wide.png")
    squeezed = decode(str(tmp_path / "wide.png"), Framing((3, 10, 10), crop="none"))
    assert squeezed[0, :, 0].max() == 0
    assert squeezed[0, :, -1].min() == 200


def test_how_images_are_brought_to_size_changes_what_is_cached_and_streamed(load: Load, folder: Path) -> None:
    usual, resized = load("folder", root=folder), load("folder", root=folder, resize=10)
    streamed = load("folder", root=folder, resize=10, memory_limit=1)
    assert isinstance(usual.test, Images)
    assert isinstance(resized.test, Images)
    assert not torch.equal(usual.test.pixels, resized.test.pixels)
    (first, _), (second, _) = (
        next(each.test.batches(4, seed=0, epoch=0, augment=None)) for each in (resized, streamed)
    )
    assert torch.equal(first, second)


def test_decoding_is_told_chunk_by_chunk(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_cli.data.decode.CHUNK", 12)
    told: list[tuple[str, int, int]] = []
    for _ in range(2):  # the second time they are cached
        load("folder", root=folder, tell=lambda *what: told.append(what))
    assert told == [("training", 12, 30), ("training", 24, 30), ("training", 30, 30), ("test", 12, 12)]


def test_second_start_reads_the_cache(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("folder", root=folder)
    monkeypatch.setattr(loading, "decode_all", lambda *_, **__: pytest.fail("decoded again"))
    second = load("folder", root=folder)
    assert torch.equal(in_memory(first.train).pixels, in_memory(second.train).pixels)


def test_changed_file_is_decoded_again(load: Load, folder: Path) -> None:
    load("folder", root=folder)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "test" / "a" / "000.png")
    assert (in_memory(load("folder", root=folder).test).pixels[0] == 9).all()


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"no array"])
def test_damaged_cache_is_decoded_again(load: Load, folder: Path, tmp_path: Path, damage: bytes) -> None:
    first = load("folder", root=folder)
    files = list((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".npy", ".npy"]
    for file in files:
        file.write_bytes(damage or file.read_bytes()[:-1])
    assert torch.equal(in_memory(load("folder", root=folder).test).pixels, in_memory(first.test).pixels)


def test_cache_that_cannot_be_written_is_done_without(
    load: Load, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "a file"))
    assert len(load("folder", root=folder).test) == 12


def test_streamed_equals_in_memory(load: Load, folder: Path) -> None:
    memory, stream = load("folder", root=folder), load("folder", root=folder, memory_limit=1)
    assert isinstance(stream.train, Streamed)
    for augment in (None, Augment(crop=2, flip=True, cutout=3)):
        for name in ("train", "validation", "test"):
            expected, labels = first_batch(getattr(memory, name), augment)
            images, streamed_labels = first_batch(getattr(stream, name), augment)
            assert torch.equal(images, expected)
            assert torch.equal(streamed_labels, labels)


@pytest.mark.parametrize("memory_limit", [2**31, 1])
def test_data_is_known_again_wherever_it_lies_and_not_when_it_changed(
    load: Load, folder: Path, tmp_path: Path, memory_limit: int
) -> None:
    first = load("folder", root=folder, memory_limit=memory_limit).fingerprints
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert load("folder", root=tmp_path / "elsewhere", memory_limit=memory_limit).fingerprints == first
    assert first["training images"].startswith("30 images")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "test" / "a" / "000.png")
    changed = load("folder", root=folder, memory_limit=memory_limit).fingerprints
    assert [changed[name] == first[name] for name in ("training images", "test images")] == [True, False]


def test_streamed_start_yields_the_tail(load: Load, folder: Path) -> None:
    split = load("folder", root=folder, memory_limit=1).train
    changes = Augment(crop=0, flip=True, resized_crop=True)
    before = torch.get_rng_state()
    whole = list(split.batches(5, seed=0, epoch=0, augment=changes))
    tail = list(split.batches(5, seed=0, epoch=0, augment=changes, start=3))
    assert torch.equal(before, torch.get_rng_state())
    assert [len(labels) for _, labels in whole] == [5, 5, 5, 5, 4]
    assert all(torch.equal(a, b) for one, two in zip(whole[3:], tail, strict=True) for a, b in zip(one, two))


def test_streamed_resized_crop_is_cut_from_the_full_size(
    load: Load, tmp_path: Path, write_images: Callable[..., None]
) -> None:
    write_images(tmp_path / "large" / "train", count=2, size=(64, 64))
    write_images(tmp_path / "large" / "test", count=1, size=(64, 64))
    changes = Augment(crop=0, resized_crop=True, flip=False)
    memory, stream = (load("folder", root=tmp_path / "large", validation=0, memory_limit=m) for m in (2**20, 1))
    reduced, _ = first_batch(memory.train, changes)
    full, _ = first_batch(stream.train, changes)
    assert full.shape == reduced.shape == (6, 3, 8, 8)
    assert full.std() > reduced.std()  # noise that was averaged away before the crop is still there


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(load: Load, folder: Path, workers: int) -> None:
    alone, helped = (load("folder", root=folder, memory_limit=1, workers=count) for count in (0, workers))
    changes = Augment(crop=0, flip=True, resized_crop=True)
    expected, images = (list(s.train.batches(4, seed=0, epoch=0, augment=changes)) for s in (alone, helped))
    assert all(torch.equal(a, b) for one, two in zip(expected, images, strict=True) for a, b in zip(one, two))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_damaged_image_is_named_from_a_worker_too(load: Load, folder: Path) -> None:
    (folder / "test" / "b" / "002.png").write_bytes(b"damaged")
    splits = load("folder", root=folder, memory_limit=1, workers=2)
    with pytest.raises(DataError, match=r"test/b/002\.png is not a readable image"):
        list(splits.test.batches(4, seed=0, epoch=0, augment=None))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"GIF89a")]
)
def test_damaged_image_is_named(load: Load, folder: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "train" / "b" / "003.png")
    with pytest.raises(DataError, match=r"train/b/003\.png is not a readable image .*; repair or remove it") as caught:
        load("folder", root=folder)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*"))


def test_sixteen_bit_image_is_refused_rather_than_clipped(load: Load, folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(folder / "train" / "a" / "000.png")
    with pytest.raises(DataError, match=r"train/a/000\.png has more than 8 bits per pixel"):
        load("folder", root=folder)


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name)


def add(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).mkdir()


def empty(name: str) -> Callable[[Path], None]:
    return lambda root: [file.unlink() for file in (root / name).iterdir()] and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("."), r"images is not a folder; expected .*images/train/<class>/\*\.jpg and .*images/test/<class>"),
        (
            lambda root: [remove(f"train/{name}")(root) for name in "abc"],
            r"images/train has no class folders; expected",
        ),
        (remove("train/a"), r"images/train has 2 class folders \(b, c\) but model\.classes is 3"),
        (add("train/d"), r"images/train has 4 class folders \(a, b, c, d\) but model\.classes is 3"),
        (remove("test/c"), r"class folders of .*images/test differ from those of .*images/train: c"),
        (add("test/x"), r"class folders of .*images/test differ from those of .*images/train: x"),
        (empty("train/b"), r"class folder .*images/train/b has no images; known endings: \.jpg"),
        (empty("test/c"), r"class folder .*images/test/c has no images"),
    ],
)
def test_folder_that_is_not_as_described_is_refused(
    load: Load, folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        load("folder", root=folder)
    assert "\n" not in str(caught.value)


def test_only_image_of_a_class_cannot_be_held_out(
    load: Load, tmp_path: Path, write_images: Callable[..., None]
) -> None:
    write_images(tmp_path / "few", count=1)
    with pytest.raises(DataError, match=r"a/000\.png is the only image of its class"):
        load("folder", root=tmp_path / "few")


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(executed) (w) file closefile
showpage
"""


def test_no_other_program_is_started_for_an_image(
    load: Load, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would hand EPS to Ghostscript, whatever the name of the file."""
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # what Pillow has found before
    (folder / "train" / "a" / "000.jpg").write_bytes(EPS)
    with pytest.raises(DataError, match=r"000\.jpg is not a readable image"):
        load("folder", root=folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipe_and_device_are_no_images(load: Load, folder: Path, kind: str) -> None:
    path = folder / "train" / "a" / "pipe.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"pipe\.png is not a readable image .*not a regular file"):
        load("folder", root=folder)
    assert len(load("folder", root=folder, max_corrupt=1, validation=0.0).train) == 30


@pytest.mark.parametrize("place", ["test", "test/a"])
def test_test_images_that_are_the_training_images_are_refused(load: Load, folder: Path, place: str) -> None:
    shutil.rmtree(folder / place)
    (folder / place).symlink_to(folder / place.replace("test", "train"))
    with pytest.raises(DataError, match="testing on the training images would tell nothing"):
        load("folder", root=folder)


@pytest.mark.thorough
def test_thousands_of_nested_folders_are_listed_or_refused_in_one_line(load: Load, folder: Path) -> None:
    place = os.open(folder / "train" / "a", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=place)
        place, above = os.open("d", os.O_RDONLY, dir_fd=place), place
        os.close(above)
    os.close(place)
    assert len(load("folder", root=folder, validation=0.0).train) == 30
    subprocess.run(["rm", "-r", folder / "train" / "a"], check=True)  # Python's own rmtree is not deep enough


def test_link_to_a_folder_around_it_is_refused(load: Load, folder: Path) -> None:
    (folder / "train" / "a" / "again").symlink_to("..")
    with pytest.raises(DataError, match="leads back to a folder around it"):
        load("folder", root=folder)
