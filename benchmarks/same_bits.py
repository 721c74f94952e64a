"""Check that the working tree computes the same bits as another revision, for changes that should only move code.

python benchmarks/same_bits.py REV                        every case; exit code 1 if one differs
python benchmarks/same_bits.py REV --only train otov2     some of them

Each case is a small `dpm train` or `dpm prune` on the bundled digits, run on one CPU thread by REV (in a temporary git
worktree) and by a copy of the working tree, uncommitted changes included. Compared are the files that they write: every
tensor byte by byte, and every number of the report and of metrics.jsonl except those in IGNORED. A tensor that only one
of them has is a difference; a number that only one has, or another text, is a note, because keys may be renamed. REV
trains the dense model that both prune. Nothing of the package is imported here: this relies on the command line and on
files alone. Results of REV stay in the system's temporary folder, so the next check only has to run the working tree.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
model: {arch: digits, classes: 10, input: [1, 8, 8]}
data: {name: digits, batch: 64, augment: {crop: 1, flip: false}}
dense: {epochs: 2, lr: 0.1}
prune: {base: depgraph, target: {macs: 0.45}, rounds: 3, end: 0.7, round_to: 1}
decay: {steps: 8}
train: {epochs: 3, lr: 0.05}
finetune: {epochs: 1, lr: 0.05}
export: []
"""
EVENTS = ("round", "compact", "epoch", "back", "cut")  # of metrics.jsonl; compared kind by kind
# Keys, at any depth of a file, whose values depend on the clock, the machine, a path or a format rather than on what
# was computed. `recipe` and `report` are copies inside slim.pt, with all of these in their text.
IGNORED = set(
    "seconds images_per_second waiting_for_data latency versions version files file path bytes recipe_hash recipe "
    "report difference compact_difference".split()  # the last two: roundings of a check, which other kernels change
)


@dataclass(frozen=True)
class Case:
    """One command with changes to RECIPE."""

    settings: str = ""  # as for --set, with spaces between them
    shows: str = ""  # places of REV's values, maybe `=value`, that are not 0 if the case does what its name says
    exit_code: int = 0
    same_as: str = ""  # killed in the middle and resumed, it must end as this other case of the same tree


GATES = "prune.base=gate-decorator train.epochs=1 "
CASES = {
    "train": Case("data.batch=32", "result.epochs=2"),  # by `dpm train`; the others by `dpm prune`
    "depgraph": Case("", "metrics.round.2.chosen report.units.released"),
    "depgraph-base": Case("decay.steps=1 decay.rectify=false", "metrics.compact.2.removed"),
    "depgraph-sparse": Case(
        "prune.sparse_epochs=1 prune.penalty=group-norm train.epochs=2 prune.rounds=2",
        "metrics.epoch.0.stage=sparse metrics.round.1.chosen",
    ),
    "depgraph-taylor": Case("prune.importance=taylor prune.observe_batches=10", "report.units.removed"),
    "otov2-adamw": Case(
        "prune.base=otov2 train.optimizer=adamw train.lr=1e-3 train.weight_decay=0.1", "report.units.removed"
    ),
    "otov2": Case("prune.base=otov2", "metrics.round.0.condemning=True report.units.removed"),
    "hesso": Case("prune.base=otov2 prune.otov2.variant=hesso decay.envelope=multiplicative", "metrics.round.2.chosen"),
    "gate-decorator": Case(GATES + "prune.rounds=2", "metrics.round.1.chosen"),
    "gate-decorator-fraction": Case(
        GATES + "prune.rounds=4 prune.gates.fraction=0.1 prune.gates.ticks_per_tock=2", "metrics.round.1.chosen"
    ),
    "on-the-fly": Case(
        "prune.base=on-the-fly prune.target.sparsity=[0.5,0.8] finetune.epochs=0 train.epochs=2",
        "metrics.cut.1.asked=0.8 report.sparsities.1.reached",
    ),
    "interrupted": Case("checkpoint.every=3", "metrics.round.2.chosen", same_as="depgraph"),
    "folding": Case("train.epochs=0 finetune.epochs=0", "metrics.compact.0.removed"),
    "max-drop": Case("prune.max_drop=2", "report.floor.is_broken metrics.back.count", exit_code=4),
    "distill": Case("train.distill=0.5 train.mixup=0.2 train.label_smoothing=0.1", "metrics.round.2.chosen"),
}


# One process for each tree imports the slow libraries once and forks for every command: half of the time is saved. A
# fork then does all that `python -m dpm_cli` does, with the package imported anew.
STARTER = """
import importlib.util, json, os, runpy, sys, torch, torchvision
print(json.dumps([importlib.util.find_spec("dpm_cli").origin, torch.get_num_threads()]), flush=True)
for line in sys.stdin:
    folder, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for number, name in enumerate((os.devnull, "result.json", "errors.txt")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv[1:] = arguments
        runpy.run_module("dpm_cli", run_name="__main__", alter_sys=True)
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Tree:
    """One revision: the process that runs its commands, and where the results go, a folder for each case."""

    name: str
    starter: "subprocess.Popen[str]"
    results: Path
    is_reference: bool

    def run(self, name: str, dense: Path) -> Path:
        """Run a case unless its results are there, and return their folder. Stops if REV does not end as it should."""
        case, done, folder = CASES[name], self.results / name, self.results / f".{name}-{os.getpid()}"
        if done.exists():
            return done
        (folder / "out").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(RECIPE)
        begin = ["train", "-o", "out/model.pt"] if name == "train" else ["prune", str(dense), "-o", "out"]
        command = [*begin, "--recipe", "recipe.yaml", "--device", "cpu", "--json"]
        for setting in case.settings.split():
            command += ["--set", setting]
        try:
            codes = []
            if case.same_as:
                codes.append(self._start(folder, command, kill=True))
                command.append("--resume")
            codes.append(self._start(folder, command))
            if self.is_reference and codes != [*([-signal.SIGKILL] if case.same_as else []), case.exit_code]:
                raise SystemExit(f"{name} ends wrongly with {self.name}, exit codes {codes}: {last_error(folder)}")
            (folder / "exit_codes").write_text(json.dumps(codes))
            return folder.rename(done)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, folder: Path, command: list[str], *, kill: bool = False) -> int:
        """Run a command and return its exit code. kill: as soon as it has written a checkpoint and a few events."""
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        print(json.dumps([str(folder), *command]), file=self.starter.stdin, flush=True)
        child = int(self.starter.stdout.readline())
        log, checkpoint = folder / "out" / "metrics.jsonl", folder / "out" / "checkpoint.pt"
        with suppress(ProcessLookupError):  # it ended by itself
            while kill:
                is_time = checkpoint.exists() and log.read_text().count("\n") >= 4
                os.kill(child, signal.SIGKILL if is_time else 0)
                kill = not is_time
                time.sleep(0.005)
        return int(self.starter.stdout.readline())


@contextmanager
def start(name: str, path: Path, results: Path, *, is_reference: bool) -> Iterator[Tree]:
    """Start the process of a tree. Stops if its commands would run other code than its own, or use several threads."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    results.mkdir(parents=True, exist_ok=True)
    pipe, command = subprocess.PIPE, [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, cwd=results, env=environment, text=True, stdin=pipe, stdout=pipe) as starter:
        assert starter.stdout is not None
        file, threads = json.loads(starter.stdout.readline() or '["nowhere", 1]')
        if not Path(file).resolve().is_relative_to(path.resolve()) or threads != 1:
            raise SystemExit(f"{name}: dpm_cli would come from {file}, not from {path}, with torch threads: {threads}")
        yield Tree(name, starter, results, is_reference)


def git(*arguments: str) -> str:
    ended = subprocess.run(["git", "-C", str(ROOT), *arguments], text=True, stdout=subprocess.PIPE)
    if ended.returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed")
    return ended.stdout


@contextmanager
def check_out(revision: str, folder: Path) -> Iterator[None]:
    git("worktree", "add", "--quiet", "--detach", str(folder), revision)
    try:
        yield
    finally:
        git("worktree", "remove", "--force", str(folder))


def copy_working_tree(folder: Path) -> None:
    """Copy all files that git does not ignore: edits while the cases run must not matter."""
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def flatten(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield every tensor, number and text within, with its place; for lists of more than text also their length."""
    if isinstance(value, list | tuple):
        if not all(isinstance(entry, str) for entry in value):
            yield f"{place}.length", len(value)
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield place, value
        return
    for key, entry in value.items():
        if key not in IGNORED:
            yield from flatten(entry, f"{place}.{key}")


def last_error(folder: Path) -> str:
    return (folder / "errors.txt").read_text().strip().rpartition("\n")[2]


def read(folder: Path) -> dict[str, Any]:
    """Collect all that a case computed, by its place; what happened first comes first."""
    codes = json.loads((folder / "exit_codes").read_text())
    values: dict[str, Any] = dict(zip(("exit code", "exit code.when killed"), reversed(codes)))
    values["error"] = last_error(folder) if codes[-1] else ""
    log, report, counts = folder / "out" / "metrics.jsonl", folder / "out" / "report.json", Counter[str]()
    for line in log.read_text().splitlines() if log.exists() else ():
        event = json.loads(line)
        if (kind := event.pop("event")) in EVENTS:
            values |= flatten(event, f"metrics.{kind}.{counts[kind]}")
            counts[kind] += 1
    values |= {f"metrics.{kind}.count": count for kind, count in counts.items()}
    for path in sorted((folder / "out").glob("*.pt")):
        values |= flatten(torch.load(path, weights_only=True), path.stem)
    made = report if report.exists() else folder / "result.json"
    return values | dict(flatten(json.loads(made.read_text() or "{}"), made.stem))


def bits(value: Any) -> object:
    """Return what is equal for equal bits alone: NaN is NaN, and -0 is not 0."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return repr(float(value)) if isinstance(value, int | float) else value


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what differs, and what is merely worth a note."""
    differences, notes, compared = list[str](), list[str](), Counter[str]()
    for place in [*old, *(place for place in new if place not in old)]:
        pair = [values[place] for values in (old, new) if place in values]
        has_tensor, is_text = isinstance(pair[0], torch.Tensor), all(isinstance(value, str) for value in pair)
        if len(pair) == 1:
            (differences if has_tensor else notes).append(f"{place} is only {'there' if place in old else 'here'}")
        elif bits(pair[0]) != bits(pair[1]):
            what = "other bits" if has_tensor else f"{pair[0]} there, {pair[1]} here"
            (notes if is_text else differences).append(f"{place}: {what}")
        if not is_text:
            compared[place.partition(".")[0]] += len(pair) == 2
    return differences + [f"nothing of {kind} could be compared" for kind, n in compared.items() if not n], notes


def check(name: str, old: Tree, new: Tree, dense: Path) -> tuple[list[str], list[str]]:
    """Run a case with both trees and compare. Returns what differs, and what is worth a note."""
    case, was, now = CASES[name], read(old.run(name, dense)), read(new.run(name, dense))
    if was["exit code"] != now["exit code"]:
        return [f"exit code {was['exit code']} there, {now['exit code']} here: {now['error']}"], []
    differences, notes = compare(was, now)
    if case.same_as:
        for tree, values in ((old, was), (new, now)):
            unlike, _ = compare(read(tree.run(case.same_as, dense)), values)
            differences += [f"{tree.name}, {case.same_as} there and {name} here: {text}" for text in unlike]
    for place, _, value in (shown.partition("=") for shown in case.shows.split()):
        if not was.get(place) or (value and str(was[place]) != value):
            notes.insert(0, f"{place} is {was.get(place)} there: the case no longer tests what its name says")
    return differences, notes


def show(name: str, differences: list[str], notes: list[str]) -> None:
    more = f" (and {len(differences) - 1} more)" if differences[1:] else ""
    print(f"{name:24} {f'DIFFERS: {differences[0]}{more}' if differences else 'same'}", flush=True)
    for note in [*notes[:5], *([f"and {len(notes) - 5} more"] if notes[5:] else [])]:
        print(f"{'':24} note: {note}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="what to compare with, such as HEAD")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--fresh", action="store_true", help="run REV again, though its results are there")
    parser.add_argument("--keep", action="store_true", help="keep the results of the working tree, and say where")
    arguments = parser.parse_args()
    commit = git("rev-parse", "--verify", f"{arguments.revision}^{{commit}}").strip()
    setup = hashlib.sha256(repr((RECIPE, CASES, torch.__version__, sys.version)).encode()).hexdigest()[:8]
    kept = Path(tempfile.gettempdir()) / f"dpm-same-bits-{os.getuid()}" / f"{commit}-{setup}"
    if arguments.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    scratch, differing = Path(tempfile.mkdtemp(prefix="dpm-same-bits-")), 0
    try:
        copy_working_tree(scratch / "new")
        with (
            check_out(commit, scratch / "old"),
            start(commit[:10], scratch / "old", kept, is_reference=True) as old,
            start("here", scratch / "new", scratch / "results", is_reference=False) as new,
        ):
            for name in arguments.only:
                dense = old.run("train", Path()) / "out" / "model.pt"
                differences, notes = check(name, old, new, dense)
                show(name, differences, notes)
                differing += bool(differences)
    finally:
        if arguments.keep:
            print(f"kept: {scratch / 'results'} and {kept}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
