"""The public Pruner, driven by loops as people write them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpm_cli
from dpm_cli.errors import RecipeError, TargetError, UsageError
from dpm_cli.events import Note, RoundStarted, UnitsRemoved

STEPS, DECAY = 12, {"steps": 3, "rectify": False}


class Net(nn.Module):
    """8 units that a residual add ties, 12 of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.back, self.back_norm = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.back_norm(self.back(F.relu(self.inner_norm(self.inner(x))))))
        return self.head(x.mean((2, 3)))


class TwoInputs(nn.Module):
    """Two images by name, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Net(), Net()

    def forward(self, a, b):
        return {"logits": self.left(a) + self.right(b), "pair": (a.mean(), b.mean())}


class Counting(Net):
    """Scales by the number of its inner channels, so that they have to stay."""

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        inner = F.relu(self.inner_norm(self.inner(x)))
        return self.head((x + self.back(inner * (inner.shape[1] / 12))).mean((2, 3)))


def make_net(kind=Net):
    torch.manual_seed(0)
    return kind()


def make_pruner(model, example=None, **changes):
    settings = {
        "target": {"macs": 0.5},
        "steps": STEPS,
        "prune": {"rounds": 2, "round_to": 1},
        "decay": DECAY,
    } | changes
    return dpm_cli.Pruner(model, torch.zeros(2, 1, 8, 8) if example is None else example, **settings)


def batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 5


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3)


def take_step(model, pruner, optimizer, step):
    images, labels = batch(step)
    F.cross_entropy(model.train()(images), labels).backward()
    pruner.before_step()
    optimizer.step()
    optimizer.zero_grad()
    pruner.after_step(optimizer)


def go(model, pruner, optimizer, steps=range(STEPS)):
    for step in steps:
        take_step(model, pruner, optimizer, step)


@pytest.mark.parametrize("base", ["depgraph", "otov2"])
def test_a_loop_meets_its_target_and_the_slim_model_is_saved_and_loaded(base, tmp_path):
    model, events = make_net(), []
    dense = copy.deepcopy(model)
    pruner = make_pruner(model, base=base, on_event=events.append)
    optimizer = sgd(model.parameters())
    go(model, pruner, optimizer)
    pruner.finish()
    from dpm_cli.measure import count_macs

    example = torch.zeros(1, 1, 8, 8)
    assert count_macs(model, example) == pruner.cost() <= 0.5 * count_macs(dense, example)
    assert {type(event) for event in events} == {RoundStarted, UnitsRemoved}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
    dpm_cli.save(model, tmp_path / "slim.pt")
    again = dpm_cli.load(tmp_path / "slim.pt", model=Net())
    images, _ = batch(99)
    assert torch.equal(again(images), model.eval()(images))


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
@pytest.mark.parametrize(
    ("base", "decay"),
    [
        ("depgraph", {"steps": 3, "rectify": {"start": 0.0, "rate": 0.5, "length": 0.5}}),
        ("otov2", DECAY),
        ("depgraph", {"steps": 1, "rectify": False}),
    ],
    ids=["depgraph", "otov2", "cut at once"],
)
@pytest.mark.every(3)
def test_an_interrupted_loop_ends_with_the_same_bits(base, decay, stop):
    settings = {"base": base, "decay": decay}
    whole = make_net()
    pruner = make_pruner(whole, **settings)
    go(whole, pruner, sgd(whole.parameters()))

    model = make_net()
    pruner = make_pruner(model, **settings)
    optimizer = sgd(model.parameters())
    go(model, pruner, optimizer, range(stop))
    saved = copy.deepcopy([pruner.state_dict(), model.state_dict(), optimizer.state_dict()])

    model = make_net()
    pruner = make_pruner(model, **settings)
    pruner.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer = sgd(model.parameters())
    optimizer.load_state_dict(saved[2])
    go(model, pruner, optimizer, range(stop, STEPS))
    pruner.finish()
    found, wanted = model.state_dict(), whole.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gradients_may_pile_up_over_several_batches():
    model = make_net()
    pruner = make_pruner(model)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        for part in range(3):
            images, labels = batch(3 * step + part)
            (F.cross_entropy(model.train()(images), labels) / 3).backward()
        pruner.before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(optimizer)
    pruner.finish()
    assert pruner.step == STEPS


def test_a_step_that_the_scaler_skips_is_skipped_by_the_decay():
    model = make_net()
    pruner = make_pruner(model)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(STEPS + 1):
        images, labels = batch(step)
        scaler.scale(F.cross_entropy(model.train()(images), labels)).backward()
        if step == 4:
            model.stem.weight.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        norms = pruner._pruning.units.norm()
        pruner.before_step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pruner.after_step(optimizer)
        if step == 4:
            assert torch.equal(norms, pruner._pruning.units.norm())
    pruner.finish()
    assert (pruner.step, pruner.skipped) == (STEPS, 1)


def test_a_skipped_step_leaves_no_trace_in_what_units_are_judged_by():
    model = make_net()
    pruner = make_pruner(model, prune={"importance": "taylor", "rounds": 1, "start": 0.5, "end": 0.9})
    optimizer, scaler, seen = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0), []
    for step in range(3):
        images, labels = batch(step)
        scaler.scale(F.cross_entropy(model.train()(images), labels)).backward()
        if step == 1:
            model.stem.weight.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        pruner.before_step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pruner.after_step(optimizer)
        seen.append(pruner.base.scores())
    assert pruner.skipped == 1
    assert pruner.base.seen == 3
    assert np.array_equal(seen[1], seen[0])
    assert (seen[2] > seen[1]).all()
    assert np.isfinite(seen[2]).all()


def test_schedulers_parameter_groups_and_two_optimizers_go_on():
    model = make_net()
    pruner = make_pruner(model)
    body = [p for name, p in model.named_parameters() if not name.startswith("head") and p.dim() > 1]
    rest = [p for name, p in model.named_parameters() if not name.startswith("head") and p.dim() == 1]
    first = torch.optim.AdamW([{"params": body}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}], 1e-2)
    second = torch.optim.Adagrad(model.head.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(first, STEPS)
    for step in range(STEPS):
        images, labels = batch(step)
        F.cross_entropy(model.train()(images), labels).backward()
        pruner.before_step()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        pruner.after_step(first, second)
    pruner.finish()
    assert [len(group["params"]) for group in first.param_groups] == [3, 6]
    assert first.param_groups[1]["weight_decay"] == 0.0
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                sizes = {v.shape for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.dim()}
                assert sizes <= {parameter.shape}


def test_frozen_layers_lose_what_reads_dead_units_and_stay_frozen():
    model = make_net()
    model.back.weight.requires_grad_(False)
    before = model.back.weight.clone()
    pruner = make_pruner(model, prune={"rounds": 2, "round_to": 1, "keep": ["back"]})
    optimizer = sgd([parameter for parameter in model.parameters() if parameter.requires_grad])
    go(model, pruner, optimizer)
    pruner.finish()
    kept = model.back.weight
    assert not kept.requires_grad
    assert kept.shape[0] == 8
    assert kept.shape[1] < 12
    columns = {tuple(column.flatten().tolist()) for column in before.unbind(1)}
    assert all(tuple(column.flatten().tolist()) in columns for column in kept.unbind(1))


def test_inputs_by_name_and_outputs_of_any_form():
    model = make_net(TwoInputs)
    example = {"a": torch.randn(2, 1, 8, 8), "b": torch.randn(2, 1, 8, 8)}
    pruner = make_pruner(model, example)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        images, labels = batch(step)
        F.cross_entropy(model.train()(a=images, b=-images)["logits"], labels).backward()
        pruner.before_step()
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(optimizer)
    pruner.finish()
    assert model(**example)["logits"].shape == (2, 5)


def test_a_batch_of_one_is_enough_for_the_analysis():
    assert len(make_pruner(make_net(), torch.zeros(1, 1, 8, 8)).groups) == 2


def test_no_steps_cut_at_once():
    model = make_net()
    pruner = make_pruner(model, steps=0)
    pruner.finish()
    assert model.inner.out_channels < 12


def test_without_steps_there_are_no_gradients_to_judge_by():
    with pytest.raises(UsageError, match=r"steps is 0, but depgraph \(fisher\) judges by the gradients"):
        make_pruner(make_net(), steps=0, prune={"importance": "fisher"})


def test_steps_after_the_target_change_no_structure():
    model = make_net()
    pruner = make_pruner(model)
    optimizer = sgd(model.parameters())
    go(model, pruner, optimizer)
    left = pruner.cost()
    go(model, pruner, optimizer, range(3))
    pruner.finish()
    assert pruner.cost() == left


def test_wrong_use_is_told_in_one_line():
    model = make_net()
    pruner = make_pruner(model)
    optimizer = sgd(model.parameters())
    with pytest.raises(UsageError, match="without before_step"):
        pruner.after_step(optimizer)
    with pytest.raises(UsageError, match=r"no gradients: call it between loss\.backward"):
        pruner.before_step()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    pruner.before_step()
    with pytest.raises(UsageError, match="twice"):
        pruner.before_step()
    with pytest.raises(UsageError, match="does not hold the model's parameter"):
        pruner.after_step(sgd(nn.Linear(2, 2).parameters()))
    with pytest.raises(TargetError, match=r"target macs <= [\d,]+ is not met after 0 of 12 steps"):
        pruner.finish()


def test_steps_that_are_over_before_the_target_is_met_are_told():
    model = make_net()
    pruner = make_pruner(model)
    optimizer = sgd(model.parameters())
    go(model, pruner, optimizer, range(5))
    pruner.steps = 5
    images, labels = batch(5)
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(TargetError, match="not met after 5 of 5 steps"):
        pruner.before_step()


def test_a_target_that_layers_put_out_of_reach_is_told(monkeypatch):
    monkeypatch.setattr("dpm_cli.graph.rehearsal.make_lively", lambda *_: None)  # nothing compares outputs before
    model, events = make_net(Counting), []
    prune = {"rounds": 2, "round_to": 1, "min_keep": 0.1}
    pruner = make_pruner(model, target={"macs": 0.08}, prune=prune, on_event=events.append)
    go(model, pruner, sgd(model.parameters()))
    with pytest.raises(
        TargetError, match=r"target macs <= [\d,]+ is not met, because layers had to stay whole: [\d,]+ "
    ):
        pruner.finish()
    assert any("inner is kept whole from now on" in event.text for event in events if isinstance(event, Note))
    with pytest.raises(UsageError, match="after finish"):
        pruner.before_step()


def test_settings_that_do_not_fit_are_refused_before_anything_changes():
    model = make_net()
    with pytest.raises(RecipeError, match=r"prune: unknown key 'round'; did you mean 'rounds'\?"):
        make_pruner(model, prune={"round": 3})
    with pytest.raises(RecipeError, match="do not fit"):
        make_pruner(model, decay={"steps": 200})
    with pytest.raises(UsageError, match=r"gate-decorator needs stages of its own \(tock, tick\)"):
        make_pruner(model, base="gate-decorator")
    with pytest.raises(UsageError, match="cuts single weights"):
        make_pruner(model, base="on-the-fly", target={"sparsity": 0.5})
    with pytest.raises(TargetError, match="cannot be met"):
        make_pruner(model, target={"macs": 0.0001})
    with pytest.raises(UsageError, match="target drop is measured on validation images, which only dpm prune has"):
        make_pruner(model, target={"drop": 1.0})
    with pytest.raises(UsageError, match=r"prune\.max_drop is measured on validation images"):
        make_pruner(model, prune={"max_drop": 1.0})
    assert model.inner.out_channels == 12


def test_a_model_of_unknown_origin_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match="was not pruned by a Pruner of this process"):
        dpm_cli.save(make_net(), tmp_path / "slim.pt")
