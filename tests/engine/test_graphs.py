"""CUDA graphs in place of forward and backward passes. Without CUDA, what cannot be recorded runs as it is."""

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.engine.graphs import Recorder, is_watched, one_pass, relative_distance, unchanged
from dpm_cli.engine.precision import choose_precision

CPU = torch.device("cpu")
IMAGES = torch.arange(96.0).reshape(4, 3, 2, 4) / 96


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 2))


def test_model_that_cannot_be_recorded_runs_as_it_is_and_says_why() -> None:
    model, twin, notes = make_model(), make_model(), []
    recorder = Recorder(model, choose_precision("fp32", CPU), notes)
    torch.manual_seed(1)
    outputs = [recorder(IMAGES) for _ in range(2)]
    torch.manual_seed(1)
    for output in outputs:
        assert torch.equal(output, twin(IMAGES))
    assert all(torch.equal(mine, other) for mine, other in zip(model.buffers(), twin.buffers(), strict=True))
    assert len(notes) == 1
    assert notes[0].startswith("no CUDA graph: ")


def test_trial_passes_leave_buffers_generators_and_gradients_alone() -> None:
    model = make_model()
    before = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    with unchanged(model, CPU):
        one_pass(model, IMAGES, model)
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_is_repeatable_and_another_model_is_told_apart() -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        other[4].weight.mul_(1.2)
    same = [one_pass(model, IMAGES, model) for _ in range(2)]
    assert relative_distance(*same) == 0
    assert relative_distance(same[0], one_pass(other, IMAGES, other)) > 0.05
    assert relative_distance(same[0], same[0][:-1]) == float("inf")


def test_hooks_are_seen() -> None:
    model = make_model()
    assert not is_watched(model)
    model[4].register_forward_hook(lambda *_: None)
    assert is_watched(model)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recording_gives_the_outputs_gradients_and_statistics_of_the_model(training: bool, precision: str) -> None:
    from dpm_cli.engine.graphs import record

    device, results = torch.device("cuda:0"), []
    for plays in (False, True):
        torch.manual_seed(0)
        layers = [layer for _ in range(8) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
        model = nn.Sequential(nn.Conv2d(3, 16, 3), *layers, nn.Flatten(), nn.Linear(16 * 36, 10))
        model.to(device).to(memory_format=torch.channels_last).train(training)
        batches = [torch.randn(16, 3, 8, 8, device=device) for _ in range(3)]
        chosen = choose_precision(precision, device)
        with chosen.autocast(cached=False):
            run = model
            if plays:
                with unchanged(model, device):
                    run = record(model, batches[0])
            passes = [one_pass(run, batch, model) for batch in batches]  # also of images that were not recorded
        results.append(
            [*(tensor for each in passes for tensor in each), *(buffer.float() for buffer in model.buffers())]
        )
    assert relative_distance(*results) < (1e-3 if precision == "fp32" else 0.03)


@pytest.mark.gpu
def test_model_that_waits_for_the_device_runs_as_it_is() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images) * (2 if images.sum().item() > 0 else 1)

    device, notes = torch.device("cuda:0"), []
    model, images = Waits().to(device), torch.ones(2, 4, device=device)
    outputs = Recorder(model, choose_precision("fp32", device), notes)(images)
    assert isinstance(outputs, Tensor)
    torch.testing.assert_close(outputs, model(images))
    assert notes
    assert torch.ones(2, device=device).sum().item() == 2  # the device goes on working
