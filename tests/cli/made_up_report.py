"""A report without a run."""

from typing import Any

from dpm_cli.report import (
    ExportedFile,
    KeptLayer,
    Measured,
    Milliseconds,
    Report,
    TargetReport,
    UnitCounts,
    Width,
)


def make_report(**changes: Any) -> Report:
    """ResNet-56 at 47 % of its MACs, as a run would report it."""
    values: dict[str, Any] = {
        "arch": "resnet56",
        "base": "depgraph",
        "method": "depgraph + DPM",
        "dense": Measured(
            macs=125_747_840,
            params=855_770,
            bytes=3_462_114,
            accuracy=93.53,
            loss=0.3,
            latency={"torch": Milliseconds(10.0, 9.9, 10.2), "onnxruntime": Milliseconds(3.0, 2.9, 3.1)},
        ),
        "slim": Measured(
            macs=59_020_000,
            params=431_000,
            bytes=1_800_000,
            accuracy=93.1,
            loss=0.32,
            latency={"torch": Milliseconds(8.0, 7.9, 8.2), "onnxruntime": Milliseconds(1.5, 1.4, 1.6)},
        ),
        "target": TargetReport("macs", 0.47, 59_101_484, 125_747_840, 59_020_000),
        "units": UnitCounts(1120, 540, 22, 518),
        "widths": [Width("conv1", 16, 8), *(Width(f"layer1.{i}.conv1", 16, 8) for i in range(9)), Width("a", 4, 4)],
        "kept": [KeptLayer("linear", "output of the model")],
        "compact_difference": 1.2e-7,
        "exports": [ExportedFile("onnx", "out/model.onnx", 1_900_000, 3.1e-7)],
        "files": {"slim": "out/slim.pt", "report": "out/report.json"},
        "seconds": {"train": 754.2, "finetune": 11_101.0},
        "seed": 0,
        "device": "cpu",
        "precision": "bf16",
        "recipe_hash": "0123456789ab",
        "versions": {"torch": "2.15"},
        "notes": ["something to know"],
    }
    return Report(**values | changes)
