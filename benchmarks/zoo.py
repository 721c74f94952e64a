"""Every torchvision classifier, and some of timm: can it be pruned to half, exactly, saved, loaded and exported?

    python benchmarks/zoo.py                      all, each in its own process with a time and memory limit
    python benchmarks/zoo.py resnet50 timm:vit_tiny_patch16_224
    python benchmarks/zoo.py --peer               also Torch-Pruning on the same models
    python benchmarks/zoo.py --peer --resume      what results/zoo.json does not hold yet

Models have random weights with randomised, calibrated BatchNorm, so that outputs are not zero. Units go by their group
norms until half of the MACs are left, widths in steps of 8, a tenth of every group at least. "difference" is relative,
before and after removal. All seconds are of one CPU core, so other work on the machine does not count: "export_s" in
torch.export, "labels_s" from its graph to groups, "rehearse_s" trying removal on copies without data; the three
together are find_groups. A model is "ok" if removal was exact, the predicted cost is the measured one, a step in train
mode works, a fresh process loads slim.pt and gives the same outputs bit for bit, and ONNX Runtime agrees; "refused"
with the reason, or "FAILED". Torch-Pruning is asked for 30 % of every layer, a trained step and nothing else.
"""

import argparse
import json
import resource
import statistics
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
MEMORY_BYTES = 14 * 2**30
SECONDS = {"dpm": 900, "peer": 120}
TIMES = "export_s labels_s rehearse_s choose_s compact_s".split()
COLUMNS = ["model", "units", *TIMES, *"analysis_GB lowest kept macs difference onnx_difference result".split()]
PEER = ["peer s", "peer GB", "peer result"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reload:
        print(json.dumps(reload(arguments.folder)))
        return
    if arguments.one:
        print(json.dumps(measure_peer(arguments.one) if arguments.peer else measure(arguments.one, arguments.folder)))
        return
    name = "zoo" if not arguments.models else "zoo-some"
    rows = read(name) if arguments.resume else {}
    for model in [f"torchvision:{model}" if ":" not in model else model for model in arguments.models] or all_models():
        row = rows[model] = rows.get(model) or run_alone(model)
        if arguments.peer and "peer result" not in row:
            row |= {f"peer {key}": value for key, value in run_peer(model).items()}
        print(json.dumps(row), flush=True)
        save(name, list(rows.values()))
    columns = COLUMNS + (PEER if arguments.peer else [])
    print_table([{column: row.get(column, "") for column in columns} for row in rows.values()])
    print_summary(list(rows.values()))


def read(name: str) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run, by model."""
    path = FOLDER / f"{name}.json"
    return {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def print_summary(rows: list[dict[str, Any]]) -> None:
    for who, key in (("dpm", "result"), ("peer", "peer result")):
        results = [str(row[key]).partition(":")[0] for row in rows if key in row]
        print(f"{who}: " + ", ".join(f"{results.count(kind)} {kind}" for kind in sorted(set(results))))
    for key in TIMES:
        values = {row["model"]: row[key] for row in rows if key in row}
        worst = max(values, key=lambda model: values[model])
        print(f"{key}: median {statistics.median(values.values()):.3f}, worst {values[worst]:.3f} ({worst})")


def all_models() -> list[str]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{name}" for name in names] + [f"timm:{name}" for name in TIMM + MORE]


def run_alone(model: str) -> dict[str, Any]:
    """In its own process: a crash, a hang or a memory leak of one model is one row."""
    with TemporaryDirectory() as folder:
        row = _run_child("--one", model, "--folder", folder, seconds=SECONDS["dpm"])
        if row["result"] == "ok":
            row["result"] = _run_child("--reload", "--folder", folder, seconds=SECONDS["dpm"])["result"]
    return {"model": model} | row


def run_peer(model: str) -> dict[str, Any]:
    return _run_child("--one", model, "--peer", seconds=SECONDS["peer"])


def _run_child(*arguments: str, seconds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"result": f"FAILED: more than {seconds} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    lines = done.stderr.strip().splitlines()
    return {"result": f"FAILED: {lines[-1][:300] if lines else done.returncode}"}


def measure(name: str, folder: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    import dpm_cli.graph.analysis as analysis
    import dpm_cli.graph.rehearsal as rehearsal
    from dpm_cli.errors import DpmError, RecipeError, TargetError, UnsupportedModelError
    from dpm_cli.export import export_model
    from dpm_cli.graph import Units, compact_, find_groups
    from dpm_cli.layers.images import Framing
    from dpm_cli.measure import count_macs, count_parameters
    from dpm_cli.method.budget import choose_victims, find_width_limits, resolve_limit
    from dpm_cli.method.pruners.depgraph import GroupImportance
    from dpm_cli.models import Metadata, build, save_slim

    limit_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = input_shape(name)
    row: dict[str, Any] = {"model": name}
    seconds = {"export": 0.0, "trace_groups": 0.0}

    def time_calls_(module: Any, name: str) -> None:
        function = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = function(*args, **kwargs)
            seconds[name] += time.process_time() - started
            return result

        setattr(module, name, timed)

    time_calls_(analysis, "export")
    time_calls_(rehearsal, "trace_groups")
    try:
        model = build(name, classes=1000, shape=shape)
        images = torch.randn(2, *shape)
        make_lively_(model, images)
        before = peak_gigabytes()
        started = time.process_time()
        groups = find_groups(model, images)
        elapsed = time.process_time() - started
        row |= {
            "export_s": seconds["export"],
            "labels_s": seconds["trace_groups"] - seconds["export"],
            "rehearse_s": elapsed - seconds["trace_groups"],
        }
        row |= {"analysis_GB": round(peak_gigabytes() - before, 2)}
        row |= {"units": groups.units, "kept": len(groups.kept)}
        widths = find_width_limits(groups, round_to=8, min_keep=0.1)
        dense = groups.cost.macs(np.ones(groups.units, bool))
        row["lowest"] = round(groups.cost.macs(widths.lowest(groups)) / dense, 3)
        limit = resolve_limit(groups, widths, kind="macs", amount=0.5)
        scores = GroupImportance(groups, model).scores("mean")
        started = time.process_time()
        victims = choose_victims(groups, widths, scores, kind="macs", limit=limit)
        row["choose_s"] = time.process_time() - started
        row["macs"] = groups.cost.macs(~victims) / dense
        Units(groups, model).scale_(torch.from_numpy(~victims).float())
        with torch.no_grad():
            before = model(images)
        started = time.process_time()
        compact_(model, groups, ~victims)
        row["compact_s"] = time.process_time() - started
        with torch.no_grad():
            after = model(images)
        row["difference"] = float((before - after).abs().max() / before.abs().max())
        predicted = groups.cost.macs(~victims), groups.cost.parameters(~victims)
        measured = count_macs(model, images), count_parameters(model)
        model.train()
        model(images).sum().backward()
        model.eval()
        with torch.no_grad():
            torch.save((images, model(images)), folder / "outputs.pt")
        save_slim(
            folder / "slim.pt",
            model,
            metadata=Metadata(1000, Framing(shape), (0.0,) * 3, (1.0,) * 3, arch=name),
            recipe="",
            report={},
        )
        made = export_model(model, images[:1], format="onnx", path=folder / "m.onnx", metadata={})
        row["onnx_difference"] = made.max_difference
        problems = [
            f"difference {row['difference']:.1e}" if not row["difference"] <= 1e-4 else "",
            f"predicted {predicted}, measured {measured}" if predicted != measured else "",
            f"{row['macs']:.3f} of the MACs are left" if row["macs"] > 0.5 else "",
        ]
        problems = [problem for problem in problems if problem]
        row["result"] = f"FAILED: {'; '.join(problems)}" if problems else "ok"
    except (UnsupportedModelError, TargetError, RecipeError) as error:
        row["result"] = f"refused: {error}"
    except DpmError as error:
        row["result"] = f"FAILED: {error}"
    row["peak_GB"] = peak_gigabytes()
    return row


def reload(folder: Path) -> dict[str, Any]:
    """In a process that knows nothing of the run: the same outputs, bit for bit?"""
    import torch

    import dpm_cli

    torch.set_num_threads(1)
    images, outputs = torch.load(folder / "outputs.pt")
    with torch.no_grad():
        same = torch.equal(dpm_cli.load(folder / "slim.pt")(images), outputs)
    return {"result": "ok" if same else "FAILED: slim.pt gives other outputs in a fresh process"}


def measure_peer(name: str) -> dict[str, Any]:
    """The same by Torch-Pruning: seconds from model to compacted model, and whether it runs and trains afterwards."""
    import torch
    import torch_pruning as tp  # type: ignore[import-untyped]

    from dpm_cli.models import build

    limit_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = input_shape(name)
    model = build(name, classes=1000, shape=shape)
    images = torch.randn(2, *shape)
    make_lively_(model, images)
    started = time.process_time()
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
    elapsed = time.process_time() - started
    model(images).sum().backward()
    return {"s": elapsed, "GB": peak_gigabytes(), "result": "ok"}


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
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pooled noise hardly varies: it would be blown up
                assert module.running_var is not None
                module.running_var.clamp_(min=1e-2)
                module.momentum = 0.1
    model.eval()


def input_shape(name: str) -> tuple[int, int, int]:
    size = {"torchvision:inception_v3": 299, "timm:mobilevit_xxs": 256, "timm:edgenext_xx_small": 256}.get(name, 224)
    return (3, size, size)


def peak_gigabytes() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    main()
