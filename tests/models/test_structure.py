import pytest
import torch
from torch import nn

from dpm_cli.errors import ModelFileError, UnsupportedModelError
from dpm_cli.models import apply_edits_, find_edits
from dpm_cli.models.structure import named_tensors


def net(width: int, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, groups=groups))


class Counting(nn.Linear):
    """Counts its calls in a plain attribute, and keeps sizes of other kinds."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)
        self.calls = 0
        self.window = (width, 7)
        self.sizes = [width, width]
        self.flag = bool(width % 2)
        self.name = str(width)


def test_edits_are_the_integers_that_shrank() -> None:
    assert find_edits(net(6, groups=3), net(8, groups=4)) == {
        "0": {"out_channels": 6},
        "1": {"num_features": 6},
        "2": {"in_channels": 6, "out_channels": 6, "groups": 3},
    }
    assert find_edits(net(8), net(8)) == {}


def test_sequences_are_edits_but_counters_booleans_and_text_are_not() -> None:
    slim = Counting(5)
    slim.calls = 9
    assert find_edits(slim, Counting(8)) == {"": {"in_features": 5, "window": [5, 7], "sizes": [5, 5]}}


def test_dense_module_may_be_on_the_meta_device() -> None:
    with torch.device("meta"):
        dense = net(8)
    assert find_edits(net(6), dense) == find_edits(net(6), net(8))


def test_applied_edits_keep_the_types_of_attributes() -> None:
    slim, module = Counting(5), Counting(8)
    apply_edits_(module, find_edits(slim, module), dict(named_tensors(slim)))
    assert (module.in_features, module.window, module.sizes) == (5, (5, 7), [5, 5])
    assert find_edits(slim, module) == {}


def test_applied_tensors_are_copies() -> None:
    slim, module = net(6), net(8)
    tensors = dict(named_tensors(slim))
    apply_edits_(module, find_edits(slim, module), tensors)
    for name, tensor in named_tensors(module):
        assert torch.equal(tensor, tensors[name])
        assert tensor.data_ptr() != tensors[name].data_ptr()


def test_shared_parameters_stay_shared() -> None:
    def tied(width: int) -> nn.ModuleList:
        layers = nn.ModuleList([nn.Linear(width, 3, bias=False), nn.Linear(width, 3, bias=False)])
        layers[1].weight = layers[0].weight
        return layers

    slim, module = tied(5), tied(8)
    apply_edits_(module, find_edits(slim, module), dict(named_tensors(slim)))
    assert module[0].weight is module[1].weight
    assert torch.equal(module[0].weight, slim[0].weight)
    slim[1].weight = nn.Parameter(slim[0].weight.detach().clone())
    with pytest.raises(UnsupportedModelError, match="share different parameters"):
        find_edits(slim, tied(8))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)), "2 exists in only one"),
        (nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)), "1 is a ReLU, .* a BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, bias=False)), "2.bias exists in only"),
        (net(9), r"0.weight is float32 \[9, 1, 3, 3\], in the architecture float32 \[8, 1, 3, 3\]"),
    ],
)
def test_another_architecture_is_refused_with_its_first_difference(other: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_edits(other, net(8))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"7": {"groups": 1}}, "no layer '7'"),
        ({"0": {"absent": 1}}, "0.absent cannot become 1"),
        ({"0": {"out_channels": 10**9}}, "0.out_channels cannot become 1000000000"),
        ({"0": {"out_channels": -1}}, "cannot become -1"),
        ({"0": {"out_channels": [3]}}, r"cannot become \[3\]"),
        ({"0": {"kernel_size": [1]}}, r"cannot become \[1\]"),
        ({"0": {"kernel_size": 1}}, "cannot become 1"),
        ({"0": {"training": 0}}, "0.training cannot become 0"),
        ({"0": {"forward": 1}}, "0.forward cannot become 1"),
    ],
)
def test_edits_that_no_pruning_makes_are_refused(edits: dict, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        apply_edits_(net(8), edits, dict(named_tensors(net(8))))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("0.weight", torch.zeros(9, 1, 3, 3), r"0.weight is float32 \[9, 1, 3, 3\], built as float32 \[8, 1, 3, 3\]"),
        ("0.weight", torch.zeros(8), r"0.weight is float32 \[8\]"),
        ("0.weight", torch.zeros(8, 1, 3, 3, dtype=torch.int64), "0.weight is int64"),
        ("0.other", torch.zeros(1), "0.other is not in the architecture"),
        ("1.running_mean", None, "1.running_mean is not in the file"),
    ],
)
def test_tensors_that_no_pruning_leaves_are_refused(name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = dict(named_tensors(net(8)))
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(ModelFileError, match=message):
        apply_edits_(net(8), {}, tensors)
