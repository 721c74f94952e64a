import dataclasses

import pytest
import torch
from torch import nn

from dpm_cli.engine.optimizer import make_optimizer
from dpm_cli.engine.precision import choose_precision
from dpm_cli.engine.step import LossMeter, all_finite, train_step
from dpm_cli.recipe import Training
from dpm_cli.tasks.classification import classification_loss

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)
IMAGES, LABELS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])


def make_model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def make_sgd(model, *, lr, momentum=0.9):
    return make_optimizer(model, Training(lr=lr, momentum=momentum, weight_decay=0))


def step(model, optimizer, *, objective=classification_loss, precision=FP32, **settings):
    return train_step(model, optimizer, IMAGES, LABELS, objective=objective, precision=precision, **settings)


def test_one_step_is_plain_gradient_descent():
    model, reference = make_model(), make_model()
    loss = step(model, make_sgd(model, lr=0.1, momentum=0))
    expected = nn.functional.cross_entropy(reference(IMAGES), LABELS)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    torch.testing.assert_close(model.weight, reference.weight - 0.1 * reference.weight.grad)


def test_hooks_run_in_order_on_the_raw_gradient_and_the_stepped_weight():
    model, reference, seen = make_model(), make_model(), []
    nn.functional.cross_entropy(reference(IMAGES), LABELS).backward()
    raw = reference.weight.grad

    def penalise():
        model.weight.grad += 5

    step(
        model,
        make_sgd(model, lr=1.0, momentum=0),
        before_step=[
            lambda: seen.append(model.weight.grad.clone()),
            penalise,
            lambda: seen.append(model.weight.grad.clone()),
        ],
        after_step=[lambda: seen.append(model.weight.detach().clone())],
    )
    torch.testing.assert_close(seen, [raw, raw + 5, reference.weight.detach() - (raw + 5)])


def test_clipping_bounds_the_norm_with_penalties():
    model = make_model()
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def penalise():
        model.weight.grad += 100

    step(model, make_sgd(model, lr=1.0, momentum=0), clip_grad=0.5, before_step=[penalise])
    moved = torch.cat([(a - b).flatten() for a, b in zip(start, model.parameters())])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_gradients_do_not_pile_up_over_steps():
    model = make_model()
    optimizer = make_sgd(model, lr=1e-30, momentum=0)
    norms = []
    for _ in range(2):
        step(model, optimizer, before_step=[lambda: norms.append(model.weight.grad.norm().item())])
    assert norms[0] == norms[1] > 0


def test_bf16_step_keeps_weights_and_gradients_in_fp32_and_near_fp32():
    model, reference = make_model(), make_model()
    step(model, make_sgd(model, lr=0.1), precision=choose_precision("bf16", CPU))
    step(reference, make_sgd(reference, lr=0.1))
    assert model.weight.dtype == model.weight.grad.dtype == torch.float32
    torch.testing.assert_close(model.weight, reference.weight, atol=2e-3, rtol=0)


def test_scaled_gradients_are_unscaled_before_hooks_and_a_skipped_step_skips_what_follows():
    precision = dataclasses.replace(FP32, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    model, plain, seen, ran = make_model(), make_model(), [], []
    settings = {"precision": precision, "after_step": [lambda: ran.append(True)]}
    optimizer = make_sgd(model, lr=0.1)
    step(model, optimizer, before_step=[lambda: seen.append(model.weight.grad.clone())], **settings)
    nn.functional.cross_entropy(plain(IMAGES), LABELS).backward()
    torch.testing.assert_close(seen[0], plain.weight.grad)
    assert ran == [True]

    weight = model.weight.detach().clone()
    step(model, optimizer, objective=lambda outputs, labels: outputs.sum() * float("inf"), **settings)
    assert torch.equal(model.weight, weight)
    assert ran == [True]
    assert precision.scaler.get_scale() == 512


def test_meter_averages_over_images():
    meter = LossMeter(CPU)
    meter.add_(torch.tensor(1.0), images=3, step=0)
    meter.add_(torch.tensor(2.0), images=1, step=1)
    assert meter.read() == (1.25, 4, None)
    meter.reset_()
    assert meter.read() == (0.0, 0, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_meter_names_the_first_bad_step(bad):
    meter = LossMeter(CPU)
    for number, value in enumerate([1.0, 2.0, bad, 1.0, bad]):
        meter.add_(torch.tensor(value), images=2, step=100 + number)
    assert meter.read().first_bad_step == 102


def test_all_finite_sees_one_bad_element_and_ignores_integers():
    good = [torch.zeros(3), torch.arange(3), torch.zeros(2, dtype=torch.bfloat16)]
    assert all_finite(good)
    assert all_finite([])
    assert not all_finite([*good, torch.tensor([0.0, float("nan")])])
    assert not all_finite([torch.tensor([float("inf")]), *good])


@pytest.mark.gpu
def test_a_step_on_cuda_does_not_wait_for_the_device():
    device = torch.device("cuda:0")
    model = make_model().to(device)
    optimizer, meter = make_sgd(model, lr=0.1), LossMeter(device)
    precision = choose_precision("auto", device)
    images, labels = IMAGES.to(device), LABELS.to(device)
    for number in range(3):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step sets things up
        try:
            loss = train_step(
                model, optimizer, images, labels, objective=classification_loss, precision=precision, clip_grad=1.0
            )
            meter.add_(loss, images=4, step=number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert meter.read().first_bad_step is None
