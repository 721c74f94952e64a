import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from dpm_cli.data import Images, Splits
from dpm_cli.errors import DataError

Load = Callable[..., Splits]
NAMES = [f"class {number}" for number in range(10)]


def write_pickle(path: Path, entry: dict[str, object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry))
    return hashlib.md5(path.read_bytes()).hexdigest()


def random_rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five batches of ten images and a test batch, in CIFAR-10's own format."""
    write_cifar10(tmp_path, monkeypatch, labels=list(range(10)))
    return tmp_path


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int]) -> None:
    place, source = root / "cifar-10-batches-py", datasets.CIFAR10
    batches = {f"data_batch_{number}": random_rows(10, number) for number in range(1, 6)}
    md5 = [[name, write_pickle(place / name, {"data": rows, "labels": labels})] for name, rows in batches.items()]
    test = write_pickle(place / "test_batch", {"data": random_rows(10, 6), "labels": list(range(10))})
    meta = write_pickle(place / "batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(source, "train_list", md5)
    monkeypatch.setattr(source, "test_list", [["test_batch", test]])
    monkeypatch.setattr(source, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})


def test_cifar10_is_read_as_it_is_on_disk(load: Load, cifar10: Path) -> None:
    splits = load("cifar10", root=cifar10, shape=(3, 32, 32), classes=10, validation=0)
    assert isinstance(splits.train, Images)
    assert torch.equal(splits.train.pixels[10].flatten(), torch.from_numpy(random_rows(10, 2)[0]))
    assert splits.train.labels.tolist() == list(range(10)) * 5
    assert (len(splits.test), splits.names, splits.mean) == (10, tuple(NAMES), (0.4914, 0.4822, 0.4465))


def test_changed_batch_is_refused_before_it_is_unpickled(load: Load, cifar10: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (cifar10 / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"cifar10 cannot be loaded .* corrupted"):
        load("cifar10", root=cifar10, shape=(3, 32, 32), classes=10)
    assert not (tmp_path / "executed").exists()


def test_label_outside_the_classes_is_named(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch, labels=[0, 1, 2, 12, 4, 5, 6, 7, 8, 9])
    with pytest.raises(DataError, match=r"cifar10 \(training images\) has label 12 at image 3; labels are 0 to 9"):
        load("cifar10", root=tmp_path, shape=(3, 32, 32), classes=10)


def test_cifar100_has_its_fine_labels(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, source = tmp_path / "cifar-100-python", datasets.CIFAR100
    for split in ("train", "test"):
        entry = {"data": random_rows(100, 0), "fine_labels": list(range(100)), "coarse_labels": [0] * 100}
        monkeypatch.setattr(source, f"{split}_list", [[split, write_pickle(place / split, entry)]])
    meta = write_pickle(place / "meta", {"fine_label_names": [str(number) for number in range(100)]})
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta})
    splits = load("cifar100", root=tmp_path, shape=(3, 32, 32), classes=100, validation=0)
    assert isinstance(splits.train, Images)
    assert splits.train.labels.tolist() == list(range(100))
    assert splits.std == (0.2675, 0.2565, 0.2761)


def write_fashion(root: Path, *, train_labels: int = 20) -> None:
    place = root / "FashionMNIST" / "raw"
    place.mkdir(parents=True)
    for split, count, labels in (("train", 20, train_labels), ("t10k", 10, 10)):
        images = struct.pack(">iiii", 0x803, count, 28, 28) + bytes(range(16)) * (count * 49)
        (place / f"{split}-images-idx3-ubyte").write_bytes(images)
        numbers = bytes(number % 10 for number in range(labels))
        (place / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, labels) + numbers)


def test_fashion_mnist_fits_a_colour_model(load: Load, tmp_path: Path) -> None:
    write_fashion(tmp_path)
    native = load("fashion-mnist", root=tmp_path, shape=(1, 28, 28), classes=10)
    colour = load("fashion-mnist", root=tmp_path, shape=(3, 32, 32), classes=10)
    assert isinstance(native.test, Images)
    assert isinstance(colour.test, Images)
    assert native.test.pixels[0, 0, 0, :16].tolist() == list(range(16))
    assert colour.test.pixels.shape == (10, 3, 32, 32)
    assert native.names[9] == "Ankle boot"


def test_labels_that_do_not_match_the_images_are_refused(load: Load, tmp_path: Path) -> None:
    write_fashion(tmp_path, train_labels=19)
    with pytest.raises(DataError, match=r"fashion-mnist cannot be loaded .*20 images but 19 labels"):
        load("fashion-mnist", root=tmp_path, shape=(1, 28, 28), classes=10)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x00\x08\x03", b"not an idx file", gzip.compress(b"packed", mtime=0)],
    ids=["empty", "short", "text", "packed"],
)
def test_damaged_file_is_refused_in_one_line(load: Load, tmp_path: Path, content: bytes) -> None:
    write_fashion(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="fashion-mnist cannot be loaded") as caught:
        load("fashion-mnist", root=tmp_path, shape=(1, 28, 28), classes=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/{data_batch_1"),
        ("cifar100", "cifar-100-python/{train, test, meta}"),
        ("fashion-mnist", "FashionMNIST/raw/{train,t10k}-{images-idx3"),
    ],
)
def test_absent_data_names_the_folder_the_files_and_the_way_out(
    load: Load, tmp_path: Path, name: str, file: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(name, root=tmp_path / "nowhere", shape=(3, 32, 32), classes=10)
    message = str(caught.value)
    assert f"{tmp_path}/nowhere/{file}" in message
    assert "data.download: true" in message
    assert "\n" not in message
    assert not (tmp_path / "nowhere").exists()


def test_failed_download_is_one_quiet_line(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(
        DataError, match=r"cifar10 cannot be loaded .*refused.* copy the files there, or set data\.root"
    ):
        load("cifar10", root=tmp_path, shape=(3, 32, 32), classes=10, download=True)
    assert capfd.readouterr() == ("", "")
