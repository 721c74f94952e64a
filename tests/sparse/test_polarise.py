import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpm_cli.sparse.polarise import (
    keep_above,
    keep_largest,
    ramp_sparsity,
    ramp_strength,
    recover,
    tail_energy,
    ternary_cosine,
)

PENALTIES = [ternary_cosine, tail_energy]
RECOVERIES = ["mean", "signed-mean", "split-mean"]
PER = ["filter", "layer"]


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("penalty", PENALTIES)
@given(seed=st.integers(0, 10**6), sparsity=st.floats(0, 0.95), scale=st.floats(1e-3, 1e3))
def test_penalties_lie_between_0_and_1_whatever_the_scale(penalty, seed, sparsity, scale):
    weight = weights(4, 3, 3, 3, seed=seed)
    mask = keep_largest(weight, sparsity, "layer")
    value = penalty(weight, mask)
    assert -1e-12 <= value <= 1
    assert torch.isclose(penalty(scale * weight, mask), value)


def test_the_ternary_cosine_is_the_cosine_to_a_ternary_weight():
    weight = weights(40)
    mask = keep_largest(weight, 0.6, "layer")
    ternary = weight.sign() * mask
    assert torch.isclose(ternary_cosine(weight, mask), 1 - torch.cosine_similarity(weight, ternary, dim=0))


def test_an_exactly_ternary_weight_costs_nothing():
    weight = torch.tensor([0.3, -0.3, 0.0, 0.3, 0.0], dtype=torch.float64)
    mask = weight != 0
    assert abs(ternary_cosine(weight, mask)) < 1e-12
    assert tail_energy(weight, mask) == 0


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_gradient_is_tangent_to_the_sphere(penalty):
    weight = weights(5, 7).requires_grad_()
    penalty(weight, keep_largest(weight, 0.5, "layer")).backward()
    assert weight.grad.norm() > 1e-3
    assert abs((weight.grad * weight).sum()) < 1e-12


def test_descent_on_the_ternary_cosine_makes_the_kept_equal_and_the_rest_zero():
    weight = weights(200).requires_grad_()
    mask = keep_largest(weight, 0.5, "layer")
    optimizer = torch.optim.SGD([weight], lr=100.0)
    for _ in range(300):
        optimizer.zero_grad()
        ternary_cosine(weight, mask).backward()
        optimizer.step()
    kept = weight.detach()[mask].abs()
    assert (kept.max() - kept.min()) / kept.mean() < 1e-6
    assert weight.detach()[~mask].abs().max() < 1e-6 * kept.mean()


def test_descent_on_the_tail_energy_empties_the_tail_and_leaves_the_kept_unequal():
    weight = weights(200).requires_grad_()
    mask = keep_largest(weight, 0.5, "layer")
    optimizer = torch.optim.SGD([weight], lr=20.0)
    for _ in range(300):
        optimizer.zero_grad()
        tail_energy(weight, mask).backward()
        optimizer.step()
    kept = weight.detach()[mask].abs()
    assert tail_energy(weight, mask) < 1e-6
    assert (kept.max() - kept.min()) / kept.mean() > 0.5


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("per", PER)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_a_mask_leaves_out_the_asked_share(per, sparsity, seed):
    weight = weights(4, 3, 3, 3, seed=seed)
    cut = int((~keep_largest(weight, sparsity, per)).sum())
    assert cut == min(round(sparsity * weight.numel()), weight.numel() - 1)


def test_a_mask_ranks_directions():
    weight = torch.tensor([[100.0, 1.0, 1.0], [0.2, 0.3, 0.4]])
    by_filter = keep_largest(weight, 0.5, "filter")  # directions: (1, .01, .01) and (.37, .56, .74)
    assert by_filter.tolist() == [[True, False, False], [False, True, True]]
    by_layer = keep_largest(weight, 0.5, "layer")  # the weights themselves
    assert by_layer.tolist() == [[True, True, True], [False, False, False]]


def test_equal_weights_are_still_cut_to_the_asked_share():
    assert int(keep_largest(torch.ones(10, 10), 0.3, "filter").sum()) == 70


def test_a_threshold_counts_in_root_mean_squares_of_a_filter():
    weight = torch.tensor([[3.0, 1.0, 1.0, 1.0], [0.03, 0.01, 0.01, 0.01]])  # root mean squares: 1.732 and 0.01732
    assert keep_above(weight, 0.6, "filter").tolist() == [[True, False, False, False]] * 2
    assert keep_above(weight, 0.5, "filter").all()
    assert keep_above(weight, 0.5, "layer").tolist() == [[True] * 4, [False] * 4]


# --------------------------------------------------------------------------------------------------------- recoveries


@pytest.mark.parametrize("per", PER)
def test_the_mean_keeps_the_sum_of_what_was_cut(per):
    weight = weights(4, 30)
    mask = keep_largest(weight, 0.5, per)
    recovered = recover(weight, mask, "mean", per)
    dim = 1 if per == "filter" else (0, 1)
    assert torch.allclose((recovered * ~mask).sum(dim), (weight * ~mask).sum(dim))


@pytest.mark.parametrize("how", RECOVERIES)
@pytest.mark.parametrize("per", PER)
def test_recoveries_are_the_nearest_of_their_kind(how, per):
    weight = weights(3, 40) + 0.2
    mask = keep_largest(weight, 0.6, per)
    best = (weight - recover(weight, mask, how, per)).square().sum()
    zeroed = recover(weight, mask, "none", per)
    filled = recover(weight, mask, how, per) - zeroed
    for factor in (0.0, 0.9, 0.99, 1.01, 1.1):  # any other constant of the same pattern is further away
        assert (weight - zeroed - factor * filled).square().sum() > best


@pytest.mark.parametrize("how", ["none", *RECOVERIES])
@pytest.mark.parametrize("per", PER)
def test_kept_weights_stay_bit_for_bit_and_a_second_recovery_changes_nothing(how, per):
    weight = weights(4, 3, 3, 3).float()
    mask = keep_largest(weight, 0.6, per)
    recovered = recover(weight, mask, how, per)
    assert torch.equal(recovered[mask], weight[mask])
    assert torch.equal(recover(recovered, mask, how, per), recovered)
    assert not torch.equal(recovered[~mask], weight[~mask])


def test_a_signed_mean_comes_nearer_than_a_mean_where_signs_are_balanced():
    weight = weights(1, 1000)
    mask = keep_largest(weight, 0.5, "layer")
    error = {how: float((weight - recover(weight, mask, how, "layer")).norm()) for how in ("none", *RECOVERIES)}
    assert error["mean"] == pytest.approx(error["none"], rel=0.02)
    assert error["signed-mean"] < 0.6 * error["none"]
    assert error["split-mean"] <= error["signed-mean"]


@pytest.mark.parametrize("how", ["none", *RECOVERIES])
def test_without_a_tail_nothing_changes(how):
    weight = weights(4, 20)
    mask = keep_largest(weight, 0.5, "layer")
    weight = weight * mask
    assert torch.equal(recover(weight, mask, how, "filter"), weight)


# -------------------------------------------------------------------------------------------------------------- ramps


def test_ramps_begin_at_nothing_and_end_at_everything():
    assert [ramp_sparsity(t, 0.8) for t in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.8, 0.8])
    assert ramp_sparsity(0.25, 0.8) == pytest.approx(0.8 * 7 / 8)
    assert [ramp_strength(t, 2.0) for t in (0.0, 0.1, 0.3, 0.5, 1.0)] == pytest.approx([0, 0, 1, 2, 2])
