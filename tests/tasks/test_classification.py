from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F

from dpm_cli.errors import UnsupportedModelError
from dpm_cli.tasks.classification import classification_loss, distillation_loss, is_at_chance, main_output, mixup

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = torch.tensor([0, 1])
Two = namedtuple("Two", ["logits", "aux_logits2", "aux_logits1"])


def cross_entropy_by_hand(logits, labels):
    return sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels)) / len(labels)


def test_plain_loss_is_mean_cross_entropy_in_fp32():
    loss = classification_loss(LOGITS.bfloat16(), LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy_by_hand(LOGITS, LABELS))


def test_label_smoothing_mixes_in_the_uniform_distribution():
    uniform = -F.log_softmax(LOGITS, 1).mean()
    expected = 0.9 * cross_entropy_by_hand(LOGITS, LABELS) + 0.1 * uniform
    torch.testing.assert_close(classification_loss(LOGITS, LABELS, label_smoothing=0.1), expected)


def test_mixed_labels_share_the_loss():
    partners = LABELS.roll(1)
    expected = 0.3 * cross_entropy_by_hand(LOGITS, LABELS) + 0.7 * cross_entropy_by_hand(LOGITS, partners)
    torch.testing.assert_close(classification_loss(LOGITS, LABELS, partners=partners, share=0.3), expected)


@pytest.mark.parametrize(
    ("outputs", "weight"),
    [
        (Two(LOGITS, -LOGITS, -LOGITS), 0.6),
        (Two(LOGITS, -LOGITS, None), 0.4),
        (Two(LOGITS, None, None), 0.0),
        ((LOGITS, torch.zeros(2, 8, 4, 4)), 0.0),
        (OrderedDict(aux=-LOGITS, out=LOGITS), 0.4),
        ({"loss": None, "logits": LOGITS, "hidden": -LOGITS}, 0.0),
        ([LOGITS], 0.0),
    ],
)
def test_auxiliary_heads_add_their_share(outputs, weight):
    assert main_output(outputs) is LOGITS
    expected = cross_entropy_by_hand(LOGITS, LABELS) + weight * cross_entropy_by_hand(-LOGITS, LABELS)
    torch.testing.assert_close(classification_loss(outputs, LABELS), expected)


@pytest.mark.parametrize("outputs", [None, "text", {}, (), torch.zeros(2, 3, 4, 4), {"loss": torch.tensor(1.0)}])
def test_outputs_that_are_no_logits_are_refused(outputs):
    with pytest.raises(UnsupportedModelError, match="logits of shape"):
        main_output(outputs)


def test_mixup_depends_on_seed_and_step_alone():
    images, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
    torch.manual_seed(1)
    first = mixup(images, labels, 0.4, seed=3, step=7)
    torch.manual_seed(2)
    again = mixup(images, labels, 0.4, seed=3, step=7)
    assert torch.equal(first.images, again.images)
    assert first.share == again.share
    shares = {mixup(images, labels, 0.4, seed=seed, step=step).share for seed in (3, 4) for step in (7, 8)}
    assert len(shares) == 4


def test_mixup_blends_each_image_with_its_partner():
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    mixed = mixup(images, labels, 1.0, seed=0, step=0)
    for blend, image, partner in zip(mixed.images, images, mixed.partners):
        torch.testing.assert_close(blend, mixed.share * image + (1 - mixed.share) * images[partner])
    assert 0 < mixed.share < 1


def test_mixup_off_changes_nothing():
    images = torch.randn(4, 3, 2, 2)
    mixed = mixup(images, torch.arange(4), 0.0, seed=0, step=0)
    assert mixed.images is images
    assert mixed.share == 1


def test_distillation_is_zero_for_equal_logits_and_kl_otherwise():
    teacher = torch.randn(2, 3)
    assert distillation_loss(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-6)
    p, q = F.softmax(teacher / 4, 1), F.softmax(LOGITS / 4, 1)
    torch.testing.assert_close(distillation_loss(LOGITS, (teacher,), 4.0), 16 * (p * (p / q).log()).sum() / 2)


def test_distillation_gives_the_teacher_no_gradient():
    student, teacher = LOGITS.clone().requires_grad_(), torch.randn(2, 3, requires_grad=True)
    distillation_loss(student, teacher, 2.0).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_chance_is_one_in_so_many_classes() -> None:
    assert is_at_chance(10.0, images=10_000, classes=10)
    assert is_at_chance(10.5, images=10_000, classes=10)  # a standard deviation is 0.3 points
    assert not is_at_chance(11.0, images=10_000, classes=10)
    assert is_at_chance(11.0, images=1_000, classes=10)
    assert not is_at_chance(60.0, images=10_000, classes=2)
