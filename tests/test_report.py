"""report.json: what is written is what is read, and nothing else is taken for a report."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dpm_cli.report import (
    ExportedFile,
    FloorReport,
    KeptLayer,
    Measured,
    Milliseconds,
    Report,
    SparsityReport,
    TargetReport,
    UnitCounts,
    Width,
)


def full_report(**changes: Any) -> Report:
    """A report in which every list and every optional part holds something."""
    network = Measured(100, 10, 40, 90.5, 0.1, {"torch": Milliseconds(2.0, 1.9, 2.1)})
    values: dict[str, Any] = {
        "arch": "digits", "base": "depgraph", "method": "depgraph + DPM", "dense": network, "slim": network,
        "target": TargetReport("macs", 0.5, 60, 100, 59), "units": UnitCounts(9, 4, 1, 3),
        "widths": [Width("conv1", 16, 8)], "kept": [KeptLayer("fc", "output of the model")],
        "compact_difference": 1e-7, "exports": [ExportedFile("onnx", "out/model.onnx", 40, 1e-7)],
        "files": {"slim": "out/slim.pt"}, "seconds": {"train": 1.5}, "seed": 0, "device": "cpu", "precision": "fp32",
        "recipe_hash": "0123456789ab", "versions": {"torch": "2.15", "threads": 2}, "validation_accuracy": 91.0,
        "notes": ["something to know"], "floor": FloorReport(1.0, 90.5, 89.5, False, None),
        "sparsities": [SparsityReport(0.5, 0.5, 40, None, 80.0, 85.0, None, "out/slim.pt")],
    }  # fmt: skip
    return Report(**values | changes)


def test_report_that_was_read_is_the_one_that_was_written() -> None:
    report = full_report()
    assert Report.from_json(report.to_json()) == report
    unknown = full_report(floor=None, arch=None, validation_accuracy=None, sparsities=[], compact_difference=1e300)
    assert Report.from_json(unknown.to_json()) == unknown


def test_report_says_whether_its_target_is_met() -> None:
    target = full_report().to_dict()["target"]
    assert list(target) == ["kind", "asked", "limit", "dense", "reached", "met"]
    assert target["met"] is True
    assert full_report(target=TargetReport("macs", 0.5, 58, 100, 59)).to_dict()["target"]["met"] is False


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(values: Any) -> None:
        *outer, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in outer:
            values = values[key]
        if value is ...:
            del values[last]
        else:
            values[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("arch", 3), ("seed", True), ("seed", "0"), ("seed", 1.5), ("seed", ...), ("extra", 1),
        ("seconds/train", "long"), ("dense/macs", "100"), ("dense/latency/torch/low", None), ("dense/extra", 1),
        ("target", []), ("target/met", ...), ("target/extra", 1), ("widths/0/layer", 1),
        ("widths/0", ["conv1", 16, 8]), ("kept", {}), ("floor/is_broken", 1), ("sparsities/0/cut", "80"),
        ("notes", "text"), ("notes/0", None), ("files", None), ("an endless key" * 500, 1),
        ("seed", "an endless value" * 500), ("several\nlines", 1),
    ],
)  # fmt: skip
def test_wrong_value_is_named_in_one_short_line(path: str, value: object) -> None:
    values = full_report().to_dict()
    change(path, value)(values)
    with pytest.raises(ValueError, match=r"\w") as caught:
        Report.from_json(json.dumps(values))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_names_of_files_that_are_no_text_can_be_read_again() -> None:
    report = full_report(notes=["left out: caf\udce9.jpg"])
    assert Report.from_json(report.to_json()).notes == ["left out: caf?.jpg"]


def test_pydantic_is_not_imported_before_a_report_is_read() -> None:
    code = "import sys, dpm_cli.report, dpm_cli.cli.app; sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
