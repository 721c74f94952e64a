import pytest
import torch
from torch import nn

from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.precision import choose_precision

FP32 = choose_precision("fp32", torch.device("cpu"))


def make_batches(sizes=(4, 4, 2)):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 5, 5, generator=generator) * 3 + size, torch.zeros(size)) for size in sizes]


def test_statistics_are_those_of_the_concatenated_batches():
    norm, batches = nn.BatchNorm2d(3), make_batches()
    recalibrate_batchnorm_(norm, iter(batches), count=10, precision=FP32)
    together = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(norm.running_mean, together.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, together.var((0, 2, 3)))


def test_only_count_batches_are_taken():
    norm, batches = nn.BatchNorm2d(3), iter(make_batches())
    recalibrate_batchnorm_(norm, batches, count=2, precision=FP32)
    assert len(list(batches)) == 1
    torch.testing.assert_close(norm.running_mean, torch.cat([x for x, _ in make_batches()[:2]]).mean((0, 2, 3)))


def test_a_layer_used_twice_counts_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(images) + self.norm(images + 10)

    model, batches = Twice(), make_batches()
    recalibrate_batchnorm_(model, iter(batches), count=3, precision=FP32)
    together = torch.cat([x + shift for x, _ in batches for shift in (0, 10)])
    torch.testing.assert_close(model.norm.running_var, together.var((0, 2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_and_hooks_are_restored_and_dropout_is_off(training):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 2, 1)).train(training)
    weights = [parameter.clone() for parameter in model.parameters()]
    batches = make_batches()
    recalibrate_batchnorm_(model, iter(batches), count=3, precision=FP32)
    torch.testing.assert_close(model[1].running_mean, torch.cat([x for x, _ in batches]).mean((0, 2, 3)))
    assert all(module.training is training for module in model.modules())
    assert model[1].momentum == 0.3
    assert not model[1]._forward_hooks
    assert all(torch.equal(before, after) for before, after in zip(weights, model.parameters()))


def test_frozen_layers_are_left_alone():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=0),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    model[1].eval()
    recalibrate_batchnorm_(model, iter(make_batches()), count=3, precision=FP32)
    assert model[0].running_mean.abs().sum() > 0
    for frozen in (model[1], model[2]):
        assert torch.equal(frozen.running_mean, torch.zeros(3))
        assert torch.equal(frozen.running_var, torch.ones(3))
    assert not model[1].training


@pytest.mark.parametrize(("sizes", "count"), [((4,), 0), ((), 3)])
def test_no_batches_change_nothing(sizes, count):
    norm = nn.BatchNorm2d(3)
    recalibrate_batchnorm_(norm, iter(make_batches(sizes)), count=count, precision=FP32)
    assert torch.equal(norm.running_var, torch.ones(3))


def test_a_failing_model_gets_its_modes_back():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(7, 1))
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm_(model, iter(make_batches()), count=1, precision=FP32)
    assert model.training
    assert model[0].momentum == 0.1
