"""Every torchvision classifier, and some of timm: can it be pruned to half, exactly, saved, loaded and exported?

    python benchmarks/zoo.py                      all, each in its own process with a time and memory limit
    python benchmarks/zoo.py resnet50 timm:vit_tiny_patch16_224
    python benchmarks/zoo.py --peer               also Torch-Pruning on the same models, in the same run

Models have random weights with randomised, calibrated BatchNorm, so that outputs are not zero. A random half of every
group that the target needs is removed; "difference" is relative, before and after removal.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import FOLDER, print_table, save

TIMM = [
    "resnet18",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "mobilevit_xxs",
]
MORE = [
    "regnetx_002",
    "ghostnet_100",
    "hrnet_w18_small",
    "res2net50_14w_8s",
    "dla34",
    "xception41",
    "repvgg_a0",
    "mixnet_s",
    "fbnetc_100",
    "mnasnet_small",
    "seresnet50",
    "ecaresnet26t",
    "resnest14d",
    "dpn68",
    "cspresnet50",
    "edgenext_xx_small",
    "poolformer_s12",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "pit_ti_224",
]
MEMORY_BYTES = 16 * 2**30
SECONDS = 600
COLUMNS = ("model", "units", "export s", "analyse s", "choose s", "compact s", "lowest", "kept", "difference", "result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_peer(arguments.one) if arguments.peer else measure(arguments.one)))
        return
    rows = []
    for model in arguments.models or all_models():
        row = run_alone(model, peer=False)
        if arguments.peer:
            row |= {f"peer {key}": value for key, value in run_alone(model, peer=True).items() if key != "model"}
        rows.append(row)
        print(json.dumps(row), flush=True)
        save("zoo" if not arguments.models else "zoo-some", rows)
    print_table([{column: row.get(column, "") for column in COLUMNS} for row in rows])


def all_models() -> list[str]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{name}" for name in names] + [f"timm:{name}" for name in TIMM + MORE]


def run_alone(model: str, *, peer: bool) -> dict[str, Any]:
    """In its own process: a crash, a hang or a memory leak of one model is one row."""
    command = [sys.executable, __file__, "--one", model, *(["--peer"] if peer else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"model": model, "result": f"more than {SECONDS} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    lines = done.stderr.strip().splitlines()
    return {"model": model, "result": f"crashed: {lines[-1][:200] if lines else done.returncode}"}


def measure(name: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from dpm_cli.budget import choose_victims, find_floors, resolve_limit
    from dpm_cli.errors import DpmError
    from dpm_cli.export import export_model
    from dpm_cli.graph import Units, compact_, find_groups
    from dpm_cli.graph.trace import export
    from dpm_cli.measure import count_macs, count_parameters
    from dpm_cli.models import build, load_slim, save_slim
    from dpm_cli.pruners.depgraph import GroupNorm

    limit_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = input_shape(name)
    row: dict[str, Any] = {"model": name}
    try:
        model = build(name, classes=1000, shape=shape)
        images = torch.randn(2, *shape)
        make_lively_(model, images)
        row["export s"] = seconds(lambda: export(model, images))
        row["analyse s"] = seconds(lambda: row.update(groups=find_groups(model, images))) - row["export s"]
        groups = row.pop("groups")
        row |= {"units": groups.units, "kept": len(groups.kept)}
        floors = find_floors(groups, round_to=8, min_keep=0.1)
        alive = np.ones(groups.units, bool)
        dense = groups.cost.macs(alive)
        row["lowest"] = round(groups.cost.macs(floors.lowest(groups)) / dense, 3)
        limit = resolve_limit(groups, floors, kind="macs", amount=0.5)
        scores = GroupNorm(groups, model).scores("mean")
        started = time.perf_counter()
        victims = choose_victims(groups, floors, scores, kind="macs", limit=limit)
        row["choose s"] = time.perf_counter() - started
        Units(groups, model).scale_(torch.from_numpy(~victims).float())
        with torch.no_grad():
            before = model(images)
        started = time.perf_counter()
        compact_(model, groups, ~victims)
        row["compact s"] = time.perf_counter() - started
        with torch.no_grad():
            after = model(images)
        row["difference"] = float((before - after).abs().max() / before.abs().max())
        row["macs kept"] = groups.cost.macs(~victims) / dense
        exact = groups.cost.macs(~victims), groups.cost.parameters(~victims)
        measured = count_macs(model, images), count_parameters(model)
        model.train()
        model(images).sum().backward()
        model.eval()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "slim.pt"
            save_slim(
                path, model, arch=name, classes=1000, shape=shape, recipe="", report={}, mean=[0.0] * 3, std=[1.0] * 3
            )
            again = load_slim(path).module
            with torch.no_grad():
                same = bool((again(images) == after).all())
            made = export_model(model, images[:1], format="onnx", path=Path(folder) / "m.onnx", metadata={})
            row["onnx difference"] = made.max_difference
        problems = [
            f"difference {row['difference']:.1e}" if not row["difference"] <= 1e-4 else "",
            f"predicted {exact}, measured {measured}" if exact != measured else "",
            "" if same else "slim.pt gives other outputs",
        ]
        row["result"] = "; ".join(problem for problem in problems if problem) or "ok"
    except DpmError as error:
        row["result"] = f"refused: {error}"
    row["peak GB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def measure_peer(name: str) -> dict[str, Any]:
    """The same by Torch-Pruning: seconds from model to compacted model, and whether it runs and trains afterwards."""
    import torch
    import torch_pruning as tp

    from dpm_cli.models import build

    limit_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = input_shape(name)
    model = build(name, classes=1000, shape=shape)
    images = torch.randn(2, *shape)
    make_lively_(model, images)
    started = time.perf_counter()
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)][-1]
    pruner = tp.pruner.MagnitudePruner(
        model,
        images,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.3,
        global_pruning=False,
        ignored_layers=[last],
        round_to=8,
    )
    pruner.step()
    elapsed = time.perf_counter() - started
    model(images).sum().backward()
    return {"model": name, "s": elapsed, "result": "ok"}


def make_lively_(model: Any, images: Any) -> None:
    """Random affine parameters, calibrated statistics, no zero-initialised layers, no dropout."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
            elif isinstance(module, nn.Linear | nn.Conv2d) and module.weight.abs().max() == 0:
                nn.init.normal_(module.weight, 0, 0.05)
            elif isinstance(module, nn.Dropout) or type(module).__name__ in ("StochasticDepth", "DropPath"):
                for attribute in ("p", "drop_prob"):
                    if hasattr(module, attribute):
                        setattr(module, attribute, 0.0)
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 3 and name.rpartition(".")[2] in (
                "layer_scale",
                "gamma",
                "gamma_1",
                "gamma_2",
                "ls1",
                "ls2",
            ):
                parameter.fill_(0.5)
        model.train()
        model(images)
    model.eval()


def input_shape(name: str) -> tuple[int, int, int]:
    size = {"torchvision:inception_v3": 299, "timm:mobilevit_xxs": 256, "timm:edgenext_xx_small": 256}.get(name, 224)
    return (3, size, size)


def seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY_BYTES, 4 * MEMORY_BYTES))


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    main()
