import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError
from dpm_cli.models import Loaded, build, load, load_model
from dpm_cli.models.structure import named_tensors
from dpm_cli.models.weights import strip_wrappers

SHAPE = (1, 8, 8)


def load_digits(path: Path, **changed: Any) -> Loaded:
    return load_model(path, **{"arch": "digits", "classes": 10, "shape": SHAPE} | changed)


def assert_same_weights(module: nn.Module, other: nn.Module) -> None:
    others = dict(named_tensors(other))
    for name, tensor in named_tensors(module):
        assert torch.equal(tensor, others[name])


def assert_refused(path: Path, message: str, **changed: Any) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        load_digits(path, **changed)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "args": None},
    "net": lambda state: {"net": state, "acc": 93.0},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled parallel": lambda state: {"model": {f"module._orig_mod.{name}": state[name] for name in state}},
    "parallel compiled": lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": state[name] for name in state}, "epoch": 3},
    "lightning compiled": lambda state: {f"model._orig_mod.{name}": tensor for name, tensor in state.items()},
    "without counts": lambda state: {name: state[name] for name in state if "num_batches" not in name},
    "double": lambda state: {name: tensor.double() for name, tensor in state.items()},
}


@pytest.mark.parametrize("found", ["model.", "module.model.", "model.model.", "model._orig_mod.model."])
def test_no_more_is_stripped_than_the_module_does_without(found: str) -> None:
    tensors = {f"{found}{name}": torch.zeros(1) for name in ("a", "b")}
    assert strip_wrappers(tensors, ["model.a", "model.b"]).keys() == {"model.a", "model.b"}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_state_dict_in_any_wrapping(tmp_path: Path, digits: nn.Module, wrapping: str, is_zip: bool) -> None:
    if wrapping == "without counts":
        digits.apply(lambda layer: isinstance(layer, nn.BatchNorm2d) and layer.num_batches_tracked.zero_())
    content = WRAPPINGS[wrapping](digits.state_dict())
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=is_zip)
    loaded = load_digits(tmp_path / "model.pt")
    assert_same_weights(loaded.module, digits)
    assert not loaded.module.training
    assert (loaded.edits, loaded.recipe, loaded.report, loaded.ignored) == ({}, None, None, ())


def test_safetensors(tmp_path: Path, digits: nn.Module) -> None:
    save_file(digits.state_dict(), tmp_path / "model.safetensors")
    assert_same_weights(load_digits(tmp_path / "model.safetensors").module, digits)
    (tmp_path / "renamed.pt").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert_same_weights(load_digits(tmp_path / "renamed.pt").module, digits)
    content = (tmp_path / "model.safetensors").read_bytes()
    for length in (4, 100, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        assert_refused(tmp_path / "cut.safetensors", "truncated or damaged")


def test_real_resnet56_fits_as_it_is(shared_data: Path) -> None:
    path = shared_data / "resnet56_cifar10.pt"
    module = load_model(path, arch="resnet56", classes=10, shape=(3, 32, 32)).module
    state = torch.load(path, weights_only=True)
    assert sum(parameter.numel() for parameter in module.parameters()) == 855_770
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items() if name in state)
    with pytest.raises(ModelFileError, match=r"2 misshapen \(linear.weight: file \[10, 64\], model \[100, 64\], "):
        load_model(path, arch="resnet56", classes=100, shape=(3, 32, 32))


def test_mismatch_lists_missing_unexpected_and_misshapen_keys(tmp_path: Path, digits: nn.Module) -> None:
    state = digits.state_dict()
    state["extra\nline"] = state.pop("bn1.weight")
    state["conv1.weight"] = torch.zeros(32, 3, 3, 3)
    torch.save(state, tmp_path / "model.pt")
    assert_refused(
        tmp_path / "model.pt",
        r"does not fit digits: 1 missing \(bn1\.weight\), 1 unexpected \(extra line\), "
        r"1 misshapen \(conv1\.weight: file \[32, 3, 3, 3\], model \[32, 1, 3, 3\]\); check model\.arch",
    )
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt", r"missing \(conv1.weight, (\S+ ){4}and \d+ more\), 1 unexpected \(weight\)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor"),
        ([torch.zeros(3)], "holds a list"),
        ({}, "empty state dict"),
        ({"state_dict": {}}, "empty state dict"),
        ({"epoch": 3, "weight": torch.zeros(3)}, "'epoch' is a int, not a tensor"),
        ({"weight": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"weight": torch.zeros(1).expand(10**12)}, "larger than its data"),
        ({"weight": torch.zeros(3, device="meta")}, "without data"),
    ],
)
def test_content_that_is_no_state_dict_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", message)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, digits: nn.Module, number: float) -> None:
    state = {name: tensor.double() for name, tensor in digits.state_dict().items()}
    state["block1.bn2.running_var"][2] = number  # 1e300 becomes infinite as float32
    torch.save(state, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", r"block1\.bn2\.running_var holds 1 NaN or infinite")


@pytest.mark.parametrize(
    ("as_whole", "dtype"),
    [
        (lambda weight: (50 * weight).to(torch.int8), "int8"),
        (lambda weight: weight > 0, "bool"),
        (lambda weight: weight.long(), "int64"),
    ],
)
def test_quantized_weights_and_masks_are_no_weights(
    tmp_path: Path, digits: nn.Module, as_whole: Any, dtype: str
) -> None:
    """Loaded as they are, they gave a net at chance."""
    state = digits.state_dict()
    torch.save(state | {"conv1.weight": as_whole(state["conv1.weight"])}, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", rf"holds torch\.{dtype} where digits has weights \(conv1\.weight\)")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(half, tmp_path / "model.pt")
    assert load_digits(tmp_path / "model.pt").module.conv1.weight.dtype == torch.float32


def test_negative_variance_is_named(tmp_path: Path, digits: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in digits.state_dict().items()}
    state["block1.bn2.running_var"][2] = -0.5
    torch.save(state, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", r"block1\.bn2\.running_var holds variances below zero")


def test_module_that_does_not_take_the_image_is_named(tmp_path: Path) -> None:
    arch = "torchvision:squeezenet1_1"
    torch.save(build(arch, classes=10, shape=(3, 8, 8)).state_dict(), tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", r"does not run on an image of \[3, 8, 8\]", arch=arch, shape=(3, 8, 8))


def test_auxiliary_heads_of_published_weights_are_left_out_and_reported(tmp_path: Path) -> None:
    arch = "torchvision:googlenet"
    state = build(arch, classes=2, shape=(3, 64, 64)).state_dict()
    torch.save(state | {"aux1.conv.conv.weight": torch.zeros(1)}, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", arch=arch, classes=2, shape=(3, 64, 64))
    assert loaded.ignored == ("aux1.conv.conv.weight",)


def test_slim_loader_refuses_a_dense_file(tmp_path: Path, digits: nn.Module) -> None:
    torch.save(digits.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match=r"is not a slim\.pt"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_pickled_module_is_refused_with_its_classes_and_the_safe_way(
    tmp_path: Path, digits: nn.Module, is_zip: bool
) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.save(digits, path, _use_new_zipfile_serialization=is_zip)
    assert_refused(
        path, r"dpm_cli\.models\.digits\.DigitsNet.*torch\.save\(model\.state_dict\(\).*model\.arch.*--trust"
    )
    assert_same_weights(load_digits(path, trust=True).module, digits)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_never_runs(tmp_path: Path, digits: nn.Module, booby: Any, is_zip: bool) -> None:
    path = tmp_path / "model.pt"
    for content in (booby, {"state_dict": digits.state_dict(), "args": booby}, {"model": booby}):
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        assert_refused(path, r"wants to run code \((posix|nt)\.mkdir\)")
        with pytest.raises(ModelFileError):
            load(path)
    path.write_bytes(pickle.dumps(booby))
    assert_refused(path, "a Python pickle that torch.save did not write")
    assert_refused(path, "a Python pickle that torch.save did not write", trust=True)
    assert not booby.trap.exists()


def test_trusted_pickle_is_adopted_dense_or_pruned(tmp_path: Path, digits: nn.Module) -> None:
    linear = nn.Linear(64, 7)
    digits.linear = linear
    torch.save(digits, tmp_path / "model.pt")
    loaded = load_digits(tmp_path / "model.pt", classes=7, trust=True)
    assert loaded.edits == {}
    assert loaded.module is not digits
    torch.save({"model": digits}, tmp_path / "inside.pt")
    assert_same_weights(load_digits(tmp_path / "inside.pt", classes=7, trust=True).module, digits)
    norm = nn.BatchNorm2d(5).eval()
    digits.block1.conv1, digits.block1.bn1 = nn.Conv2d(32, 5, 3, padding=1, bias=False), norm
    digits.block1.conv2 = nn.Conv2d(5, 32, 3, padding=1, bias=False)
    torch.save(digits, tmp_path / "pruned.pt")
    loaded = load_digits(tmp_path / "pruned.pt", classes=7, trust=True)
    assert loaded.edits["block1.conv1"] == {"out_channels": 5}
    assert_same_weights(loaded.module, digits)


def test_trusted_pickle_of_something_else_is_refused(tmp_path: Path, digits: nn.Module) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt", r"holds a Linear that is not model\.arch digits", trust=True)
    digits.bn1.eps = 1.0  # the same tensors, another function
    torch.save(digits, tmp_path / "changed.pt")
    assert_refused(tmp_path / "changed.pt", "outputs differ", trust=True)
    with zipfile.ZipFile(tmp_path / "absent.pt", "w") as archive:
        archive.writestr("absent/data.pkl", b"\x80\x02cabsent_module\nNet\n.")
        archive.writestr("absent/version", b"3\n")
    assert_refused(tmp_path / "absent.pt", "cannot be unpickled.*absent_module", trust=True)


def test_truncated_file_is_one_line_wherever_it_ends(tmp_path: Path, digits: nn.Module) -> None:
    for is_zip in (True, False):
        torch.save(digits.state_dict(), tmp_path / "model.pt", _use_new_zipfile_serialization=is_zip)
        content = (tmp_path / "model.pt").read_bytes()
        for length in range(0, len(content), len(content) // 20):
            (tmp_path / "cut.pt").write_bytes(content[:length])
            assert_refused(tmp_path / "cut.pt", "truncated or damaged|is empty|model format")


def test_flipped_bit_in_the_weights_is_found(tmp_path: Path, digits: nn.Module) -> None:
    torch.save(digits.state_dict(), tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    place = content.index(digits.conv1.weight.detach().numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    assert_refused(tmp_path / "model.pt", "truncated or damaged")


def rezip(source: Path, target: Path, changed: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A torch archive with some records replaced, and checksums that are right again."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.partition("/")[2], old.read(name)))


def test_compressed_archive_is_refused_before_it_unpacks(tmp_path: Path, digits: nn.Module) -> None:
    torch.save(digits.state_dict(), tmp_path / "model.pt")
    rezip(tmp_path / "model.pt", tmp_path / "bomb.pt", {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert_refused(tmp_path / "bomb.pt", "is compressed")


def test_archive_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    directory = content.rindex(b"PK\x01\x02", 0, content.index(b"model/data/0", content.index(b"PK\x01\x02")))
    for field in (20, 24):  # compressed and uncompressed size
        content[directory + field : directory + field + 4] = struct.pack("<I", 2**31)
    (tmp_path / "model.pt").write_bytes(content)
    assert_refused(tmp_path / "model.pt", "is compressed|truncated or damaged")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_pickle_stream_is_one_line_or_finite_weights(
    tmp_path: Path, digits: nn.Module, data: st.DataObject
) -> None:
    """Bytes of the pickle are changed under right checksums, as an attacker would."""
    source = tmp_path / "source.pt"
    torch.save(digits.state_dict(), source)
    with zipfile.ZipFile(source) as archive:
        stream = bytearray(archive.read("source/data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    rezip(source, tmp_path / "hostile.pt", {"data.pkl": bytes(stream)})
    try:
        loaded = load_digits(tmp_path / "hostile.pt")
    except ModelFileError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.module.state_dict().values())


def test_storage_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer)
    (tmp_path / "source.pt").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "source.pt") as archive:
        stream = archive.read("archive/data.pkl")
    assert stream.count(b"K\x04") == 2  # elements of the storage, and of the tensor
    rezip(tmp_path / "source.pt", tmp_path / "huge.pt", {"data.pkl": stream.replace(b"K\x04", b"J\xff\xff\xff\x7f")})
    assert_refused(tmp_path / "huge.pt", "truncated or damaged")
