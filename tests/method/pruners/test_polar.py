import torch

from dpm_cli.method.pruners.polar import polar_pulls
from dpm_cli.sparse.polarise import ternary_cosine


def test_polar_pulls_are_descent_on_the_ternary_cosine_of_every_group():
    dice = torch.Generator().manual_seed(0)
    norms = (torch.randn(12, generator=dice, dtype=torch.float64).abs() + 0.1).requires_grad_()
    group = torch.tensor([0] * 7 + [1] * 5)
    pulls = polar_pulls(norms.detach(), group, 2)
    for number in (0, 1):
        of_group = norms[group == number]
        mask = of_group.detach() >= of_group.detach().mean()
        (gradient,) = torch.autograd.grad(ternary_cosine(of_group, mask), of_group)
        expected = gradient * of_group.detach().square().sum()
        assert torch.allclose(pulls[group == number] * of_group.detach(), expected)


def test_polar_pulls_part_the_units():
    norms = torch.linspace(0.5, 1.5, 20)
    start = norms.clone()
    for _ in range(300):
        norms = norms - 0.05 * polar_pulls(norms, torch.zeros(20, dtype=torch.int64), 1) * norms
    assert norms[start < 1].max() < 1e-3
    assert (norms[start >= 1].max() / norms[start >= 1].min()) < 1.01
