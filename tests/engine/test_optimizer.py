import io

import pytest
import torch
from torch import nn

from dpm_cli.engine.optimizer import make_optimizer, optimizer_state, restore_optimizer_state_
from dpm_cli.errors import RunError
from dpm_cli.recipe import Training

SETTINGS = [
    Training(optimizer="sgd", lr=0.1, nesterov=True, weight_decay=1e-3),
    Training(optimizer="adamw", lr=0.01, weight_decay=0.1),
]
PLAIN = Training(lr=0.1, weight_decay=0)
ADAMW = Training(optimizer="adamw", lr=0.1, weight_decay=0)


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    model.to(memory_format=torch.channels_last)
    return model


def train(model, optimizer, steps):
    for step in steps:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("setting", SETTINGS, ids=["sgd", "adamw"])
def test_restored_state_continues_bit_for_bit(setting):
    straight = make_model()
    optimizer = make_optimizer(straight, setting)
    train(straight, optimizer, range(3))
    weights, state = through_a_file((straight.state_dict(), optimizer_state(optimizer, straight)))
    train(straight, optimizer, range(3, 6))

    resumed = make_model()
    resumed.load_state_dict(weights)
    optimizer = make_optimizer(resumed, setting)
    restore_optimizer_state_(optimizer, resumed, state)
    train(resumed, optimizer, range(3, 6))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_restored_tensors_are_copies_in_the_layout_of_the_weight():
    model = make_model()
    optimizer = make_optimizer(model, PLAIN)
    saved = torch.randn(8, 3, 3, 3)
    restore_optimizer_state_(optimizer, model, {"0.weight": {"momentum_buffer": saved}})
    restored = optimizer_state(optimizer, model)["0.weight"]["momentum_buffer"]
    assert torch.equal(restored, saved)
    assert restored.stride() == model[0].weight.stride() != saved.stride()


def test_state_survives_the_removal_of_channels():
    model = nn.Linear(3, 4)
    optimizer = make_optimizer(model, ADAMW)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    kept = torch.tensor([0, 2])
    state = {
        name: {key: value[kept] if value.dim() else value for key, value in values.items()}
        for name, values in optimizer_state(optimizer, model).items()
    }
    slim = nn.Linear(3, 2)
    slim_optimizer = make_optimizer(slim, ADAMW)
    restore_optimizer_state_(slim_optimizer, slim, state)
    assert torch.equal(slim_optimizer.state[slim.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"][kept])
    assert slim_optimizer.state[slim.bias]["step"] == 1


@pytest.mark.parametrize("state", [{"gone": {}}, {"weight": {"momentum_buffer": torch.zeros(1, 3)}}])
def test_state_of_another_model_is_refused(state):
    model = nn.Linear(3, 4)
    with pytest.raises(RunError, match="optimizer state"):
        restore_optimizer_state_(make_optimizer(model, PLAIN), model, state)


def test_only_what_requires_gradients_is_optimized_in_order():
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = make_optimizer(model, Training(lr=0.1, weight_decay=0.5))
    (group,) = optimizer.param_groups
    expected = [parameter for name, parameter in model.named_parameters() if name != "0.weight"]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in expected]
    assert group["weight_decay"] == 0.5
    assert optimizer_state(optimizer, model) == {}


def test_a_gradient_in_another_layout_steps_the_right_elements():
    conv = nn.Conv2d(4, 8, 3, bias=False).to(memory_format=torch.channels_last)
    start, gradient = conv.weight.detach().clone(), torch.randn(8, 4, 3, 3)
    optimizer = make_optimizer(conv, Training(lr=0.5, momentum=0.9, weight_decay=0))
    for _ in range(2):
        conv.weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), start - 0.5 * (1 + 1.9) * gradient)
