"""Whether several processes do as README.md promises: the same command with as many gives the same bits.

python benchmarks/processes.py --work runs --images FOLDER     runs what is missing, prints and writes the table
python benchmarks/processes.py --work runs                     with images that are drawn here

Every net, base and seed is pruned by one, two and three processes of one thread, by two and three twice. Ends
with 1 if a command fails, misses its target, or gives other bits the second time. What one, two and three decide may
differ, as they add numbers up in another order; the table tells how often it does, and where they part: by how much the
loss of the first epoch differs from that of one process, and the first step at which another unit was chosen or left.
FOLDER has the layout train/<class>/*, test/<class>/* in ten classes.
"""

import argparse
import itertools
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import print_table, save
from PIL import Image

from dpm_cli.cli.app import main as dpm
from dpm_cli.graph import find_groups
from dpm_cli.jobs import prune as jobs
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build
from dpm_cli.run import delivery

BASES = ["depgraph", "otov2", "gate-decorator"]
RUNS = [(1, False), (2, False), (2, True), (3, False), (3, True)]  # number of processes, and whether again
CLASSES, DRAWN = 10, {"train": 40, "test": 10}  # images per class
RUN: dict[str, Any] = {
    "prune.rounds": 2,
    "prune.round_to": 4,
    "prune.target.macs": 0.5,
    "decay.steps": 2,
    "finetune.epochs": 1,
    "export": "[]",
}
NETS: dict[str, tuple[str, dict[str, Any], int]] = {
    "digits": ("digits", {"data.limit": 300, "train.epochs": 4}, 20),
    "resnet20": (
        "resnet56-folder",
        {"model.arch": "resnet20", "data.limit": 200, "data.batch": 32, "train.epochs": 3},
        4,
    ),
}  # a recipe, what is changed in it, and the epochs of the dense net


class Case(NamedTuple):
    net: str
    base: str
    seed: int

    def folder(self, work: Path, processes: int, again: bool) -> Path:
        return work / f"{self.net}-{self.base}-{self.seed}-{processes}{'-again' if again else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run, as precision=fp32")
    given = parser.parse_args()
    prepare_forks()
    given.work.mkdir(parents=True, exist_ok=True)
    images = given.images or draw_images(given.work / "images")
    for net in given.nets:
        train(net, given.work, images)
    rows: list[dict[str, Any]] = []
    for case in itertools.starmap(Case, itertools.product(given.nets, given.bases, range(given.seeds))):
        for processes, again in RUNS:
            prune(case, given.work, images, processes, again=again, more=given.set)
        rows += compare(case, given.work)
        save("processes", rows, changes=given.set, run=RUN, images="drawn" if given.images is None else "a folder")
    print_table(rows)
    return 0 if all(row["same bits again"] and row["targets met"] for row in rows) else 1


def prepare_forks() -> None:
    """Import what every run needs, and leave out what takes time and decides nothing: latencies, and the page."""
    torch.set_num_threads(1)
    find_groups(build("digits", classes=CLASSES, shape=(1, 8, 8)), torch.zeros(2, 1, 8, 8))
    vars(delivery)["measure_in_turns"] = partial(measure_in_turns, seconds=0.002)
    vars(jobs)["write_page"] = lambda folder: None


def draw_images(folder: Path) -> Path:
    """Noise of a colour per class, as image files."""
    for (split, count), label in itertools.product(DRAWN.items(), range(CLASSES)):
        for number in range(count):
            path = folder / split / f"{label}" / f"{number}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng([label, number, split == "test"]).integers(0, 200, (32, 32, 3))
                Image.fromarray((pixels + 5 * label).astype(np.uint8)).save(path)
    return folder


def train(net: str, work: Path, images: Path) -> None:
    recipe, changes, epochs = NETS[net]
    path = work / f"{net}.pt"
    changes = changes | {"dense.epochs": epochs}
    if not path.exists():
        line = ["train", "--recipe", recipe, "--output", path, "--device", "cpu", "--quiet", "--resume"]
        launch(line, place(net, changes, images), processes=1)


def prune(case: Case, work: Path, images: Path, processes: int, *, again: bool, more: Sequence[str]) -> None:
    """Prune in several processes of one thread each, unless that is done."""
    recipe, changes, _ = NETS[case.net]
    folder = case.folder(work, processes, again)
    if (folder / "report.json").exists():
        return
    changes = changes | RUN | {"prune.base": case.base}
    line = ["prune", work / f"{case.net}.pt", "--recipe", recipe, "--output", folder, "--device", "cpu", "--overwrite"]
    launch([*line, "--seed", case.seed], [*place(case.net, changes, images), *more], processes)


def place(net: str, changes: dict[str, Any], images: Path) -> list[str]:
    """Return changes of a recipe as the command line takes them, with the images of those nets that need some."""
    if net != "digits":
        changes = changes | {"data.root": images}
    return [f"{key}={value}" for key, value in changes.items()]


def launch(line: Sequence[object], changes: Sequence[str], processes: int) -> None:
    """Run a command of dpm in so many processes, as a launcher starts them. Raises SystemExit if one of them fails."""
    arguments = [*map(str, line), *(each for change in changes for each in ("--set", change))]
    with socket.socket() as free, tempfile.TemporaryFile("w+") as said:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        started = [
            fork(
                arguments, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}, said.fileno()
            )
            for rank in range(processes)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
        if any(codes):
            said.seek(0)
            raise SystemExit(f"exit codes {codes} of dpm {' '.join(arguments)}:\n{said.read()[-2000:]}")


def fork(arguments: list[str], environment: dict[str, str], output: int) -> int:
    """Start a process that has imported torch already, which else takes most of its time. Returns its number."""
    process = os.fork()
    if not process:
        os.environ.update(environment)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # A fork loses torch's pool of threads; when two threads renew it at once, the process aborts. This is one.
        torch.set_num_threads(1)
        code = 70
        try:
            code = dpm(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def compare(case: Case, work: Path) -> Iterator[dict[str, Any]]:
    """A row for two and for three processes, beside one."""
    alone = case.folder(work, 1, again=False)
    for processes in (2, 3):
        once, again = (case.folder(work, processes, again=each) for each in (False, True))
        target, target_alone = (json.loads((each / "report.json").read_text())["target"] for each in (once, alone))
        loss, loss_alone = (next(events(folder, "epoch"))["loss"] for folder in (once, alone))
        yield {
            **case._asdict(),
            "processes": processes,
            "same bits again": is_same(once, again),
            "targets met": target["met"] and target_alone["met"],
            "MACs": target["reached"],
            "MACs of one": target_alone["reached"],
            "loss of epoch 1 differs by": abs(loss / loss_alone - 1),
            "decisions part at": part(once, alone),
        }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "slim.pt", weights_only=True)["state_dict"]
    return state


def is_same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def part(one: Path, other: Path) -> str:
    """Return the first step at which the runs chose, released or removed other units, or "never"."""
    for ours, theirs in itertools.zip_longest(decisions(one), decisions(other)):
        if ours != theirs:
            return "{stage} {step}".format(**(ours or theirs))
    return "never"


def decisions(folder: Path) -> Iterator[dict[str, Any]]:
    """All that was chosen, released and removed, with the numbers in the dense net of some of these units."""
    for event in events(folder, "round", "units", "compact"):
        event.pop("difference", None)
        yield event | {"norms": list(event.get("norms", ()))}


def events(folder: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return (event for event in lines if event["event"] in kinds)


if __name__ == "__main__":
    sys.exit(main())
