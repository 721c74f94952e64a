"""Published weights and files of another number of classes: what is loaded, what is replaced, what is said."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from dpm_cli.errors import ModelFileError, RecipeError
from dpm_cli.models import build
from dpm_cli.models.pretrained import load_pretrained, split_published

SHAPE = (3, 32, 32)
ARCH = "torchvision:squeezenet1_1"  # the smallest files
URL = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps what it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    return place


@pytest.fixture
def published(home: Path) -> nn.Module:
    """A net of 1 000 classes, as if its weights had been downloaded before."""
    torch.manual_seed(1)
    module = build(ARCH, classes=1000, shape=SHAPE).eval()
    torch.save(module.state_dict(), home / Path(URL).name)
    return module


def load(weights: str, *, arch: str = ARCH, classes: int = 3, seed: int = 0):
    return load_pretrained(weights, arch=arch, classes=classes, shape=SHAPE, seed=seed)


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1"])
def test_published_weights_are_loaded_whole_if_the_classes_agree(published: nn.Module, name: str) -> None:
    found = load(f"torchvision:{name}", classes=1000)
    assert found.note is None
    assert all(torch.equal(t, published.state_dict()[name]) for name, t in found.module.state_dict().items())
    assert not found.module.training


def test_head_of_another_number_of_classes_is_replaced_and_said_so(published: nn.Module) -> None:
    before = torch.get_rng_state()
    found, again = load("torchvision:DEFAULT"), load("torchvision:DEFAULT")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.note == (
        "torchvision:DEFAULT knows 1000 classes, model.classes is 3: the head classifier.1 is new and untrained"
    )
    for name, tensor in found.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])  # the seed alone decides the new head
        if not name.startswith("classifier.1"):
            assert torch.equal(tensor, published.state_dict()[name])
    other = load("torchvision:DEFAULT", seed=1).module
    assert not torch.equal(other.state_dict()["classifier.1.weight"], found.module.state_dict()["classifier.1.weight"])


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_file_gives_all_but_its_head(published: nn.Module, tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": {wrapper + name: t for name, t in published.state_dict().items()}}, path)
    found = load(str(path))
    assert found.note
    assert found.note.startswith(f"{path} knows 1000 classes")
    assert torch.equal(found.module.features[0].weight, published.features[0].weight)  # type: ignore[index, union-attr]


def test_file_of_the_same_classes_is_loaded_whole(tmp_path: Path) -> None:
    module = build("digits", classes=10, shape=(1, 8, 8))
    torch.save(module.state_dict(), tmp_path / "mine.pt")
    found = load_pretrained(str(tmp_path / "mine.pt"), arch="digits", classes=10, shape=(1, 8, 8))
    assert found.note is None


def test_weights_whose_head_cannot_be_found_are_refused(published: nn.Module, home: Path) -> None:
    path = home / Path(URL).name
    weights = torch.load(path) | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    torch.save(weights, path)
    with pytest.raises(ModelFileError, match=r"torchvision:DEFAULT does not fit .* misshapen .features\.0\.weight"):
        load("torchvision:DEFAULT")


@pytest.mark.parametrize(
    ("weights", "arch", "message"),
    [
        ("torchvision:DEFALT", ARCH, r"model\.weights is 'torchvision:DEFALT'; did you mean 'torchvision:DEFAULT'\?"),
        ("torchvision:DEFAULT", "resnet20", r"model\.arch is resnet20: give weights of the same library, or a file"),
        ("timm:DEFAULT", ARCH, "give weights of the same library"),
    ],
)
def test_unknown_weights_are_one_line(weights: str, arch: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(weights, arch=arch)


def test_without_network_the_file_and_its_place_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ModelFileError) as error:
        load("torchvision:DEFAULT")
    assert "\n" not in str(error.value)
    assert f"put it at {home / Path(URL).name}" in str(error.value)
    assert "or give a file as model.weights" in str(error.value)


def test_a_file_that_is_absent_is_named() -> None:
    with pytest.raises(ModelFileError, match=r"no model file 'nowhere\.pt'"):
        load("nowhere.pt")


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_published("timm:resnet18") == ("timm", "resnet18")
    Path("timm:resnet18").touch()
    assert split_published("timm:resnet18") is None
    assert split_published("model.pt") is None
