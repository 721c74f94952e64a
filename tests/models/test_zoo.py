import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpm_cli.errors import RecipeError
from dpm_cli.models import BUILT_IN, build

CIFAR = (3, 32, 32)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, shape: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("arch", sorted(BUILT_IN))
def test_built_in_gives_logits_of_any_batch_channels_and_classes(arch: str) -> None:
    module = build(arch, classes=7, shape=(2, 32, 32)).eval()
    with torch.no_grad():
        assert module(torch.randn(2, 2, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_resnet_has_parameters_and_macs_of_its_formula(depth: int) -> None:
    blocks = (depth - 2) // 6
    weights = 3 * 16 * 9 + 64 * 10  # stem, classifier
    macs = 3 * 16 * 9 * 32**2 + 64 * 10
    norms = 16
    for width, side in ((16, 32), (32, 16), (64, 8)):
        inputs = width if width == 16 else width // 2
        stage = 9 * (inputs * width + (2 * blocks - 1) * width**2) + (0 if width == 16 else inputs * width)
        weights, macs = weights + stage, macs + stage * side**2
        norms += 2 * blocks * width + (0 if width == 16 else width)
    module = build(f"resnet{depth}", classes=10, shape=CIFAR)
    assert count_parameters(module) == weights + 10 + 2 * norms
    assert count_macs(module, CIFAR) == macs


def test_published_sizes() -> None:
    resnet56, vgg16 = (build(arch, classes=10, shape=CIFAR) for arch in ("resnet56", "vgg16_bn"))
    assert (count_parameters(resnet56), count_parameters(vgg16)) == (855_770, 14_728_266)
    assert count_macs(resnet56, CIFAR) == pytest.approx(127.1e6, rel=2e-2)


def test_vgg19_has_sixteen_convolutions_with_bias() -> None:
    convolutions = [layer for layer in build("vgg19_bn", classes=10, shape=CIFAR).modules() if type(layer) is nn.Conv2d]
    assert len(convolutions) == 16
    assert all(layer.bias is not None for layer in convolutions)


@pytest.mark.slow
def test_digits_net_learns_digits() -> None:
    from dpm_cli.data import load_data
    from dpm_cli.recipe.sections import Data

    splits = load_data(Data(name="digits", validation=0.0), shape=(1, 8, 8), classes=10, seed=0)
    torch.manual_seed(0)
    module = build("digits", classes=10, shape=(1, 8, 8))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=15)
    for epoch in range(15):
        for images, labels in splits.train.batches(128, seed=0, epoch=epoch, augment=None):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images), labels).backward()
            optimizer.step()
        schedule.step()
    module.eval()
    with torch.no_grad():
        hits = [module(x).argmax(1) == y for x, y in splits.test.batches(512, seed=0, epoch=0, augment=None)]
    assert torch.cat(hits).float().mean() > 0.97


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'resnet56'"):
        build("resnet57", classes=10, shape=CIFAR)
    with pytest.raises(RecipeError, match=r"nor torchvision:NAME, .*known: resnet20, "):
        build("zzz", classes=10, shape=CIFAR)
    with pytest.raises(RecipeError, match="did you mean 'torchvision:resnet18'"):
        build("torchvision:resnet-18", classes=10, shape=CIFAR)


def test_vgg_refuses_images_that_vanish_in_its_pools() -> None:
    with pytest.raises(RecipeError, match="32×32 or more"):
        build("vgg16_bn", classes=10, shape=(3, 28, 28))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "googlenet"])
def test_torchvision_by_name(name: str) -> None:
    module = build(f"torchvision:{name}", classes=3, shape=(3, 64, 64))
    with torch.no_grad():
        assert module(torch.randn(2, 3, 64, 64)).shape == (2, 3)  # one tensor also in training mode


def test_torchvision_transformer_takes_the_image_size_of_the_recipe() -> None:
    with torch.device("meta"):
        module = build("torchvision:vit_b_32", classes=3, shape=(3, 64, 64))
    assert module.get_parameter("encoder.pos_embedding").shape == (1, 1 + (64 // 32) ** 2, 768)
    with pytest.raises(RecipeError, match="cannot be built"):
        build("torchvision:vit_b_32", classes=3, shape=(3, 33, 33))
    with pytest.raises(RecipeError, match="square"):
        build("torchvision:vit_b_32", classes=3, shape=(3, 64, 32))


@pytest.mark.slow
def test_torchvision_is_imported_only_where_it_is_named() -> None:
    code = "import sys, dpm_cli.models; print('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_torchvision_takes_three_channels() -> None:
    with pytest.raises(RecipeError, match="3 channels"):
        build("torchvision:resnet18", classes=10, shape=(1, 32, 32))


def test_timm_names_its_extra_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"pip install 'dpm-cli\[timm\]'"):
        build("timm:resnet18", classes=10, shape=CIFAR)


def test_timm_by_name_and_never_from_a_hub() -> None:
    pytest.importorskip("timm")
    with torch.no_grad():
        assert build("timm:resnet10t", classes=5, shape=(1, 32, 32)).eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    with pytest.raises(RecipeError):
        build("timm:hf-hub:someone/something", classes=5, shape=CIFAR)


def test_a_detector_or_segmenter_is_told_apart_from_a_wrong_name() -> None:
    with pytest.raises(RecipeError, match="no image classifier: classification only, for now"):
        build("torchvision:fcn_resnet50", classes=3, shape=(3, 64, 64))
