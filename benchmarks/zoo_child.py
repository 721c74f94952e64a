"""Measure one model of the zoo: analyse, cut, compare, train, save, export. zoo.py runs this in its own process."""

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo_models import build

import dpm_cli.graph.analysis as analysis
import dpm_cli.graph.rehearsal as rehearsal
from dpm_cli.errors import DpmError, UnsupportedModelError
from dpm_cli.export import export_model
from dpm_cli.graph import Groups, Units, compact_, find_groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import run_example
from dpm_cli.layers.images import Framing
from dpm_cli.layers.modes import plain_attention
from dpm_cli.measure import count_parameters
from dpm_cli.method.budget import find_width_limits
from dpm_cli.models import Metadata, save_slim

warnings.simplefilter("ignore")
SINGLE, DOUBLE = 1e-5, 1e-7  # differences that are none
seconds = {"export": 0.0, "trace_groups": 0.0}


def measure(name: str, exports: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {"model": name}
    try:
        model, example = build(name)
    except Exception as error:
        return row | {"result": f"refused: cannot be built here: {error!r:.200}"}
    try:
        problems = list(examine(row, model, example, exports, seed, folder))
        row["result"] = f"FAILED: {'; '.join(problems)}" if problems else "ok" if row["lowest"] <= 0.5 else "limited"
    except UnsupportedModelError as error:
        row["result"] = f"refused: {error}"
    except DpmError as error:
        row["result"] = f"FAILED: {error}"
    except Exception as error:
        row["result"] = f"FAILED: {where(error)}{error!r:.300}"
    return row


def where(error: Exception) -> str:
    """The last place of ours in a traceback."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "dpm_cli" in code.co_filename or "zoo_child" in code.co_filename:
            place = f"{Path(code.co_filename).name}:{trace.tb_lineno} "
        trace = trace.tb_next
    return place


def examine(row: dict[str, Any], model: nn.Module, example: Any, exports: list[str], seed: int, folder: Path) -> Any:
    """Fill the row and yield what is wrong."""
    make_lively_(model, example)
    time_calls_(analysis, "export")
    time_calls_(rehearsal, "trace_groups")
    started = time.process_time()
    groups = find_groups(model, example)
    elapsed = time.process_time() - started
    row |= {
        "export_s": round(seconds["export"], 3),
        "labels_s": round(seconds["trace_groups"] - seconds["export"], 3),
        "rehearse_s": round(elapsed - seconds["trace_groups"], 3),
        "groups": len(groups),
        "units": groups.units,
    }
    everything = np.ones(groups.units, bool)
    dense = groups.cost.macs(everything)
    least = find_width_limits(groups, round_to=1, min_keep=0.1).lowest(groups)
    row |= {
        "macs": dense,
        "lowest": round(groups.cost.macs(least) / max(dense, 1), 3),
        "reasons": {reason: round(macs / max(dense, 1), 3) for reason, macs in groups.macs_kept().items()},
    }
    if not groups.units:
        return
    alive = draw_survivors(groups, seed)
    row["left"] = round(groups.cost.macs(alive) / max(dense, 1), 3)
    slim = copy.deepcopy(model)
    Units(groups, slim).scale_(torch.from_numpy(alive).float())
    zeroed = copy.deepcopy(slim)
    compact_(slim, groups, alive)
    row["difference"] = difference_of(zeroed, slim, example)
    if not row["difference"] <= SINGLE:
        row["difference64"] = difference_of(zeroed.double(), copy.deepcopy(slim).double(), to_double(example))
        if not row["difference64"] <= DOUBLE:
            yield f"outputs change by {row['difference']:.1e}, in fp64 {row['difference64']:.1e}"
    predicted, measured = groups.cost.parameters(alive), count_parameters(slim)
    if predicted != measured:
        yield f"{predicted} parameters predicted, {measured} measured"
    yield from train(model, slim, example)
    deliver(row, model, slim, example, exports, folder)


def train(model: nn.Module, slim: nn.Module, example: Any) -> Any:
    """A step in train mode must work if it does for the dense model."""
    try:
        backward(slim, example)
    except Exception as error:
        try:
            backward(copy.deepcopy(model), example)
        except Exception:
            return  # detectors want targets
        yield f"does not train: {error!r:.200}"


def backward(model: nn.Module, example: Any) -> None:
    model.train()
    leaves = tree_leaves(run_example(model, example))
    sum(leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()).backward()
    model.eval()


def deliver(
    row: dict[str, Any], model: nn.Module, slim: nn.Module, example: Any, exports: list[str], folder: Path
) -> None:
    """A slim.pt and exports, of models that take pictures and give one tensor."""
    if not exports:
        return
    slim.eval()
    with torch.no_grad(), plain_attention():
        outputs = run_example(slim, example)
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) and example.dim() == 4 else None
    if shape is None or not isinstance(outputs, Tensor) or outputs.dim() != 2:
        return
    if "slim" in exports:
        save_slim(
            folder / "slim.pt",
            slim,
            metadata=Metadata(outputs.shape[1], Framing(shape), (0.0,) * 3, (1.0,) * 3),
            recipe="",
            report={},
            dense=model,
        )
    for kind in [kind for kind in exports if kind != "slim"]:
        made = export_model(slim, example[:1], format=kind, path=folder / f"m.{kind}", metadata={})
        row[kind] = made.max_difference


def draw_survivors(groups: Groups, seed: int) -> Flags:
    """(units,) Another random share of every group, but as many as its code needs."""
    random = np.random.default_rng(seed)
    alive = np.ones(groups.units, bool)
    for group in groups:
        left = max(group.least, 1, round(group.size * random.uniform(0.2, 0.9)))
        alive[group.start + random.permutation(group.size)[left:]] = False
    return alive


def difference_of(left: nn.Module, right: nn.Module, example: Any) -> float:
    """The largest relative difference of any output."""
    from dpm_cli.layers.outputs import output_tensors, relative_difference

    both = []
    for model in (left, right):
        torch.manual_seed(0)
        with torch.no_grad(), plain_attention():
            both.append(output_tensors(run_example(model.eval(), example)))
    return relative_difference(*([out.double() for out in outs] for outs in both))


def to_double(example: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)


def time_calls_(module: Any, name: str) -> None:
    function = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.process_time() - started

    setattr(module, name, timed)


def make_lively_(model: nn.Module, example: Any) -> None:
    """Random affine parameters, calibrated statistics, no layer that is zero, no dropout."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
                if module.weight is not None:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0, 0.3)
            for attribute in ("p", "drop_prob"):
                if isinstance(getattr(module, attribute, None), float) and "Drop" in type(module).__name__:
                    setattr(module, attribute, 0.0)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.abs().max() <= 1e-3:
                parameter.normal_(0, 0.05)  # zero-initialised, or a layer scale
        try:
            model.train()
            run_example(model, example)
        except Exception:
            pass  # some only train with targets
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.1
                if module.running_var is not None:  # pooled noise hardly varies: it would be blown up
                    module.running_var.clamp_(min=1e-2)
    model.eval()
