import pytest
import torch
from torch import nn

from dpm_cli.engine import precision as precision_module
from dpm_cli.engine.backends import tuned_backends
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.precision import choose_layout, choose_precision, lay_out_
from dpm_cli.errors import UsageError
from dpm_cli.recipe.sections import Engine

CPU = torch.device("cpu")


def test_auto_takes_cuda_when_it_is_there():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "CPU", "cuda:x"])
def test_unknown_device_names_what_is_there(name):
    with pytest.raises(UsageError, match=r"here: auto, cpu") as caught:
        choose_device(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'cuda'"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_auto_is_bf16_exactly_where_the_cpu_has_it(monkeypatch):
    for has_avx, has_amx in [(False, False), (True, False), (False, True)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_avx: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        assert choose_precision("auto", CPU).name == ("bf16" if has_avx or has_amx else "fp32")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_from_cuda_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_module.choose_precision("auto", torch.device("cuda:0")).name == expected


def test_fp16_on_cpu_is_refused():
    with pytest.raises(UsageError, match=r"fp16.*needs CUDA"):
        choose_precision("fp16", CPU)


def test_bf16_computes_in_16_bits_and_leaves_weights_alone():
    layer = nn.Linear(4, 4)
    with choose_precision("bf16", CPU).autocast():
        assert layer(torch.ones(2, 4)).dtype == torch.bfloat16
    with choose_precision("fp32", CPU).autocast():
        assert layer(torch.ones(2, 4)).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolutions_compute_in_fp32_between_bf16_neighbours(stride):
    """Their backward pass in bf16 is many times slower on a CPU."""
    before, depthwise = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, stride=stride, padding=1, groups=8)
    images = torch.randn(2, 8, 6, 6)
    with choose_precision("bf16", CPU).autocast():
        inputs = before(images)
        outputs = depthwise(inputs)
        assert nn.Conv2d(8, 8, 3, groups=2)(inputs).dtype == torch.bfloat16
    assert outputs.dtype == inputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, depthwise(inputs.float()).bfloat16(), rtol=0, atol=0)
    outputs.float().square().sum().backward()
    exact = nn.Conv2d(8, 8, 3, stride=stride, padding=1, groups=8)
    exact.load_state_dict(depthwise.state_dict())
    exact(inputs.detach().float()).bfloat16().float().square().sum().backward()
    torch.testing.assert_close(depthwise.weight.grad, exact.weight.grad, rtol=1e-6, atol=1e-6)
    assert before.weight.grad is not None


class Joins(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_layout_is_channels_last_unless_the_models_own_code_fails_with_it():
    convolution, images = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)
    assert choose_layout(nn.Sequential(convolution, nn.Flatten()), images) == torch.channels_last
    assert choose_layout(nn.Sequential(convolution, Joins()), images) == torch.contiguous_format
    assert choose_layout(nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), Joins()), images) == torch.channels_last
    assert convolution.weight.is_contiguous()
    assert convolution.training


def test_fast_layout_spreads_from_weights_to_activations():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    images = torch.randn(2, 3, 8, 8)
    before = model.eval()(images)
    assert choose_layout(model, images) == torch.channels_last
    model.to(memory_format=torch.channels_last)
    after = model(images)
    assert after.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before)


def test_layout_of_a_model_with_5d_weights_is_that_of_its_4d_ones():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep = nn.Conv2d(3, 8, 3), nn.Conv3d(8, 4, (1, 3, 3))

        def forward(self, x):
            return self.deep(self.flat(x)[:, :, None]).mean((2, 3, 4))

    model = Video()
    layout = choose_layout(model, torch.zeros(2, 3, 8, 8))
    lay_out_(model, layout)
    assert layout == torch.channels_last
    assert model.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.deep.weight.is_contiguous()


def test_backends_are_left_alone_on_a_cpu() -> None:
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    with tuned_backends(torch.device("cpu"), Engine(deterministic=True)):
        assert (torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_backends_of_a_gpu_are_set_and_restored(deterministic: bool) -> None:
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    with tuned_backends(torch.device("cuda:0"), Engine(deterministic=deterministic)):
        assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert (torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()) == before
