import copy
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, RunError, UnsupportedModelError
from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, build, load, load_model, load_slim, save_slim
from dpm_cli.models.structure import find_edits, named_tensors

SHAPE = (1, 8, 8)


class Grouped(nn.Module):
    """Depthwise, grouped and transposed convolutions with batch and group normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, groups=width),
            nn.GroupNorm(width // 2, width),
            nn.Conv2d(width, 2 * width, 1, groups=2),
            nn.PReLU(2 * width),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2, groups=2),
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Attentive(nn.Module):
    """Tokens with an embedding, a bare parameter, attention, layer normalisation, and buffers of both kinds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.places = nn.Embedding(4, width)
        self.scale = nn.Parameter(torch.rand(width))
        self.attention = nn.MultiheadAttention(width, width // 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)
        self.register_buffer("offset", torch.rand(width))
        self.register_buffer("mask", torch.rand(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.places.weight  # (B, 4, width)
        tokens = tokens * self.scale + self.offset * self.mask
        tokens = self.norm(self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return self.head(tokens.mean(1))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.left, self.right = nn.Linear(width, 4), nn.Linear(width, 4)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        return self.left(hidden) * self.right(hidden)


def save(path: Path, module: nn.Module, **changed: Any) -> Path:
    said = {"arch": None, "classes": 4, "mean": (0.5,), "std": (0.25,)}
    said |= {key: changed.pop(key) for key in (*said, "names") if key in changed}
    metadata = Metadata(framing=Framing(changed.pop("shape", SHAPE)), **said)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {"metadata": metadata, "recipe": "seed: 0\n", "report": {"macs": [1, 2]}}
    save_slim(path, module, **arguments | changed)
    return path


def integers(module: nn.Module) -> dict[str, dict[str, object]]:
    """Every attribute of every layer that is made of numbers."""
    return {
        name: {key: value for key, value in vars(layer).items() if isinstance(value, int | float | tuple | list)}
        for name, layer in module.eval().named_modules()
    }


def assert_same(module: nn.Module, other: nn.Module) -> None:
    assert integers(module) == integers(other)
    tensors, others = dict(named_tensors(module)), dict(named_tensors(other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.stride()) == (others[name].dtype, others[name].clone().stride())  # views: compact
        assert tensor.requires_grad == others[name].requires_grad
        assert torch.equal(tensor, others[name])
    images = torch.randn(3, *SHAPE, dtype=next(module.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(module.eval()(images), other.eval()(images))


@pytest.mark.parametrize("make", [Grouped, Attentive, Tied])
def test_rebuilt_module_is_the_same_bit_for_bit(tmp_path: Path, make: Callable[[int], nn.Module]) -> None:
    slim, dense = make(6).eval(), make(8)
    path = save(tmp_path / "slim.pt", slim, dense=dense)
    assert_same(load(path, model=make(8)), slim)


def test_rebuilt_module_keeps_ties_dtype_layout_and_what_is_frozen(tmp_path: Path) -> None:
    tied = load(save(tmp_path / "tied.pt", Tied(6), dense=Tied(8)), model=Tied(8))
    assert tied.left.weight is tied.right.weight
    slim = Grouped(6).to(torch.float64, memory_format=torch.channels_last).eval()
    slim.head.bias.requires_grad_(False)
    assert_same(load(save(tmp_path / "slim.pt", slim, dense=Grouped(8)), model=Grouped(8)), slim)
    half = Grouped(6).bfloat16().eval()
    assert_same(load(save(tmp_path / "half.pt", half, dense=Grouped(8)), model=Grouped(8)), half)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(widths=st.lists(st.integers(1, 8), min_size=4, max_size=4), seed=st.integers(0, 2**31))
@pytest.mark.thorough
def test_any_widths_survive_the_round_trip(tmp_path: Path, widths: list[int], seed: int) -> None:
    def make(a: int, b: int, c: int, d: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.Conv2d(a, a, 3, groups=a), nn.Conv2d(a, b, 1),
            nn.GroupNorm(1, b), nn.ConvTranspose2d(b, c, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(c, d), nn.LayerNorm(d), nn.Linear(d, 4),
        )  # fmt: skip

    torch.manual_seed(seed)
    slim = make(*widths).eval()
    path = save(tmp_path / "slim.pt", slim, dense=make(8, 8, 8, 8))
    assert_same(load(path, model=make(8, 8, 8, 8)), slim)


def bare(width: int, *, bias: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=bias), nn.ConvTranspose2d(width, width, 2, bias=bias, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4, bias=bias),
    )  # fmt: skip


def test_biases_that_the_architecture_does_not_have_survive_the_round_trip(tmp_path: Path) -> None:
    slim = bare(6, bias=True).eval()
    path = save(tmp_path / "slim.pt", slim, dense=bare(8))
    loaded = load(path, model=bare(8))
    assert_same(loaded, slim)
    save(tmp_path / "again.pt", loaded, dense=bare(8))


def test_a_bias_of_another_width_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "slim.pt", bare(6, bias=True).eval(), dense=bare(8))
    content = torch.load(path, weights_only=True)
    for wrong in (torch.zeros(9), torch.zeros(5), torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64)):
        torch.save(content | {"state_dict": content["state_dict"] | {"0.bias": wrong}}, path)
        with pytest.raises(ModelFileError):
            load(path, model=bare(8))


def test_dense_module_may_be_on_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        dense = Attentive(8)
    slim = Attentive(6).eval()
    assert_same(load(save(tmp_path / "slim.pt", slim, dense=dense), model=Attentive(8)), slim)


def prune_digits_once(module: nn.Module, width: int) -> nn.Module:
    """The digits net with the first `width` channels inside its first block."""
    slim = copy.deepcopy(module)
    block = slim.block1
    for layer, axis in ((block.conv1, 0), (block.conv2, 1)):
        layer.weight = nn.Parameter(layer.weight.detach().narrow(axis, 0, width))
    for name, tensor in list(named_tensors(block.bn1)):
        if tensor.dim():
            kept = tensor.detach()[:width]
            setattr(block.bn1, name, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = width
    return slim


def test_named_architecture_needs_nothing_but_the_file(tmp_path: Path, digits: nn.Module) -> None:
    slim = prune_digits_once(digits, 12)
    path = save(tmp_path / "slim.pt", slim, arch="digits", classes=10)
    loaded = load_slim(path)
    assert_same(loaded.module, slim)
    assert (loaded.arch, loaded.classes, loaded.shape) == ("digits", 10, SHAPE)
    assert (loaded.recipe, loaded.report) == ("seed: 0\n", {"macs": [1, 2]})
    assert loaded.metadata == Metadata(10, Framing(SHAPE), (0.5,), (0.25,), arch="digits")
    assert not loaded.module.training
    assert not find_edits(slim, loaded.module)


def test_module_pruned_twice_is_saved_like_one_pruned_once(tmp_path: Path, digits: nn.Module) -> None:
    once = save(tmp_path / "once.pt", prune_digits_once(digits, 20), arch="digits", classes=10)
    again = load_model(once, arch="digits", classes=10, shape=SHAPE)
    assert again.edits["block1.conv1"] == {"out_channels": 20}
    assert (again.recipe, again.report) == ("seed: 0\n", {"macs": [1, 2]})
    twice = prune_digits_once(again.module, 9)
    assert_same(load(save(tmp_path / "twice.pt", twice, arch="digits", classes=10)), twice)


def test_file_is_plain_and_holds_no_more_than_the_slim_weights(tmp_path: Path, digits: nn.Module) -> None:
    slim = prune_digits_once(digits, 4)  # its weights are views of the dense ones
    slim.linear.weight.grad = torch.ones_like(slim.linear.weight)
    slim.linear.register_forward_hook(lambda *_: None)
    path = save(tmp_path / "slim.pt", slim, arch="digits", classes=10)
    content = torch.load(path, weights_only=True)
    assert (content["format"], content["version"], content["arch"]) == ("dpm-slim", 1, "digits")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in slim.state_dict().values())
    assert path.stat().st_size < needed + 30_000


def test_loading_and_saving_leave_the_dice_alone(tmp_path: Path, digits: nn.Module) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    path = save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    load(path)
    load_model(path, arch="digits", classes=10, shape=SHAPE)
    assert torch.equal(torch.rand(3), expected)


def test_saving_keeps_the_mode_of_every_layer(tmp_path: Path, digits: nn.Module) -> None:
    digits.train()
    digits.bn1.eval()
    statistics = digits.bn1.running_mean.clone()
    save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    assert (digits.training, digits.block1.bn1.training, digits.bn1.training) == (True, True, False)
    assert torch.equal(digits.bn1.running_mean, statistics)


def test_module_of_another_architecture_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="exists in only one"):
        save(tmp_path / "slim.pt", Grouped(6), arch="digits")
    assert list(tmp_path.iterdir()) == []


def test_module_that_would_not_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    slim = Grouped(6)
    slim.body[5].forward = lambda x: x * 3  # something that no attribute tells
    with pytest.raises(RunError, match="outputs differ"):
        save(tmp_path / "slim.pt", slim, dense=Grouped(8))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, digits: nn.Module) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"slim\.pt cannot be written: File too large"):
            save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_code_that_a_file_names_is_imported_only_if_the_caller_names_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"slim_code_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    slim = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    path = save(tmp_path / "slim.pt", slim, arch=f"{name}:net")
    sys.modules.pop(name)
    with pytest.raises(ModelFileError, match=f"names code to import, '{name}:net': pass arch="):
        load(path)
    assert name not in sys.modules
    assert_same(load(path, f"{name}:net"), slim)
    assert_same(load_model(path, arch=f"{name}:net", classes=4, shape=SHAPE).module, slim)
    (tmp_path / f"{name}.py").unlink()
    assert_same(load(path, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), slim)


def test_file_of_another_architecture_or_task_is_refused(tmp_path: Path, digits: nn.Module) -> None:
    path = save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    with pytest.raises(ModelFileError, match=r"holds a digits, model\.arch is resnet20"):
        load(path, "resnet20")
    with pytest.raises(ModelFileError, match=r"has 10 classes .*model\.classes 9"):
        load_model(path, arch="digits", classes=9, shape=SHAPE)
    with pytest.raises(ModelFileError, match="does not fit the given model"):
        load(path, model=Grouped(8))
    object_path = save(tmp_path / "object.pt", Grouped(6), dense=Grouped(8))
    with pytest.raises(ModelFileError, match="pass model="):
        load(object_path)


def test_given_module_is_left_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "slim.pt", Grouped(6), dense=Grouped(8))
    given_module = Grouped(8)
    assert load(path, model=given_module) is not given_module
    assert given_module.head.weight.shape == (4, 8)


def change(path: Path, **changed: Any) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in (content | changed).items() if value is not ...}, path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 3}, "format version 3, this dpm reads 2: update it"),
        ({"version": "1"}, "damaged: 'version'"),
        ({"version": 0}, "damaged: 'version'"),
        ({"version": True}, "damaged: 'version'"),
        ({"arch": 3}, "damaged: 'arch'"),
        ({"arch": "a\nb"}, "damaged: 'arch'"),
        ({"arch": "os:getcwd"}, "names code to import"),
        ({"arch": "digit"}, "cannot be rebuilt: model.arch is 'digit', neither"),
        ({"classes": 10**6}, "damaged: 'classes'"),
        ({"classes": 10.0}, "damaged: 'classes'"),
        ({"classes": 32}, "one image gives outputs"),
        ({"shape": [1, 8]}, "damaged: 'shape'"),
        ({"shape": [1, 8, 10**9]}, "damaged: 'shape'"),
        ({"edits": []}, "damaged: 'edits'"),
        ({"edits": {"conv1": 3}}, "damaged: 'edits'"),
        ({"edits": {"conv1": {"groups": "3"}}}, "damaged: 'edits'"),
        ({"edits": {"conv1": {"groups": 0}}}, "does not run"),
        ({"edits": {"conv1": {"padding": [10**9, 10**9]}}}, "cannot become"),
        ({"edits": {"no": {}}}, "no layer 'no'"),
        ({"state_dict": []}, "damaged: 'state_dict'"),
        ({"state_dict": {"conv1.weight": 1}}, "is a int, not a tensor"),
        ({"state_dict": {1: torch.zeros(10)}}, "holds no state dict"),
        ({"state_dict": {"linear.bias": torch.zeros(10)}}, "are not in the file"),
        ({"state_dict": {"linear.bias": torch.zeros(1).expand(10**12)}}, "larger than its data"),
        ({"state_dict": {"linear.bias": torch.zeros(10, dtype=torch.complex64)}}, "complex64"),
        ({"state_dict": {"linear.bias": torch.zeros(10).to_sparse()}}, "sparse"),
        ({"state_dict": {"linear.bias": torch.zeros(10, device="meta")}}, "without data"),
        ({"buffers": ...}, "damaged: 'buffers'"),
        ({"frozen": [3]}, "damaged: 'frozen'"),
        ({"recipe": 3}, "damaged: 'recipe'"),
        ({"report": "{"}, "damaged: 'report'"),
        ({"report": "[" * 100_000}, "damaged: 'report'"),
        ({"report": "[]"}, "damaged: 'report'"),
        ({"mean": [0.0, 0.0]}, "damaged: 'mean'"),
        ({"mean": [float("nan")]}, "damaged: 'mean'"),
        ({"std": [0.0]}, "damaged: 'std'"),
        ({"format": "dpm-slum"}, "is not a slim.pt"),
    ],
)
@pytest.mark.every(4)
def test_hostile_value_is_one_line(tmp_path: Path, digits: nn.Module, changed: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    change(path, **changed)
    with pytest.raises(ModelFileError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, digits: nn.Module) -> None:
    path = save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    state_dict = torch.load(path, weights_only=True)["state_dict"]
    state_dict["bn1.weight"][3] = float("inf")
    change(path, state_dict=state_dict)
    with pytest.raises(ModelFileError, match=r"bn1\.weight holds 1 NaN or infinite"):
        load(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    slim = Tied(3).eval()
    return save(tmp_path_factory.mktemp("slim") / "slim.pt", slim, dense=Tied(4)), slim


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_the_same_model_or_one_line(
    tmp_path: Path, small_file: tuple[Path, nn.Module], data: st.DataObject
) -> None:
    path, slim = small_file
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        for _ in range(data.draw(st.integers(1, 3), label="flips")):
            content[data.draw(st.integers(0, len(content) - 1), label="place")] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(content)
    try:
        module = load(damaged, model=Tied(4))
    except ModelFileError:
        return
    assert_same(module, slim)


def test_saved_file_can_be_read_by_others(tmp_path: Path, digits: nn.Module) -> None:
    mask = os.umask(0o022)
    try:
        path = save(tmp_path / "slim.pt", digits, arch="digits", classes=10)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


def test_torchvision_model_round_trip(tmp_path: Path) -> None:
    module = build("torchvision:squeezenet1_1", classes=3, shape=(3, 32, 32)).eval()
    path = save(
        tmp_path / "slim.pt", module, arch="torchvision:squeezenet1_1", classes=3, shape=(3, 32, 32),
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    for name, tensor in named_tensors(load(path)):
        assert torch.equal(tensor, module.get_parameter(name))
