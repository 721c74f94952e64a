import pytest
import torch
from torch import nn

from dpm_cli.engine.evaluate import evaluate, evaluate_module
from dpm_cli.engine.precision import choose_precision
from dpm_cli.errors import DataError


class Listed:
    """A split that is a list of images and labels."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def batches(self, batch, *, seed, epoch, augment):
        assert augment is None
        yield from zip(self.images.split(batch), self.labels.split(batch))


ROWS = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 5.0], [4.0, 1.0], [0.0, 9.0]])
SPLIT = Listed(ROWS.view(5, 2, 1, 1), torch.tensor([0, 1, 0, 0, 1]))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_score_is_the_hand_count_for_any_batch(batch):
    score = evaluate(lambda images: images.flatten(1), SPLIT, batch=batch)
    losses = [torch.logsumexp(row, 0) - row[label] for row, label in zip(ROWS, SPLIT.labels)]
    assert score.accuracy == 80.0
    assert score.images == 5
    assert score.loss == pytest.approx(float(sum(losses) / 5), rel=1e-6)


def test_module_is_scored_in_eval_mode_and_keeps_its_modes():
    frozen = nn.BatchNorm2d(2).eval()
    model = nn.Sequential(frozen, nn.Dropout(0.9), nn.Flatten())
    statistics = frozen.running_mean.clone()
    assert evaluate_module(model, SPLIT, batch=2).accuracy == 80.0
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert torch.equal(frozen.running_mean, statistics)


def test_precision_reaches_the_model():
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    evaluate_module(model, SPLIT, batch=5, precision=choose_precision("bf16", torch.device("cpu")))
    evaluate_module(model, SPLIT, batch=5)
    assert seen == [torch.bfloat16, torch.float32]


def test_an_empty_split_is_an_error():
    class Empty:
        def batches(self, batch, *, seed, epoch, augment):
            return iter(())

    with pytest.raises(DataError, match="holds no images"):
        evaluate(lambda images: images, Empty(), batch=1)
