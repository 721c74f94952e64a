"""The parts of `gpu.py`, in order of worth: which benchmarks they run, for how long, and how small in a rehearsal."""

import json
import math
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gpu_kit import IMAGES
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CLASSES, DRAWN = 10, {"train": 13, "test": 2}  # images of each class that a rehearsal draws
UNKNOWN = 4.0  # seconds of an epoch, if throughput could not be measured
SHARING = 1.8  # how much faster several runs at once are than one after the other; a guess until it is measured
WORKERS = 4
SEEDS = 2
COST = 2 * (1 + 1.35 * 2 + 1)  # epochs of one seed's runs by those of one: two budgets, two of four arms with a teacher


@dataclass(frozen=True)
class Job:
    """One program: a file of this folder, or a module. Jobs of one part run at the same time."""

    name: str
    program: str
    arguments: tuple[object, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Place:
    """Where jobs run and what they find there."""

    work: Path
    kit: Path | None
    rehearses: bool

    @property
    def results(self) -> Path:
        return self.work / "results"

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def images(self) -> Path:
        return self.work / "images"

    @property
    def device(self) -> str:
        return "cpu" if self.rehearses else "cuda"

    def make(self) -> None:
        """Make the folders, and in a rehearsal a kit with a few drawn images."""
        for folder in (self.results, self.runs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        if self.rehearses:
            draw_images(self.work / "kit" / IMAGES)

    def environment(self) -> dict[str, str]:
        """Let benchmarks write their rows here, and decoded images be kept here."""
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            "BENCHMARK_RESULTS": str(self.results),
            "DPM_CACHE": str(self.work / "decoded"),
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
        }
        return settings | ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if self.rehearses else {})

    def read(self, name: str) -> list[Mapping[str, Any]]:
        """Return the rows that a benchmark wrote, or none."""
        path = self.results / f"{name}.json"
        rows: list[Mapping[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
        return rows


@dataclass(frozen=True)
class Part:
    """Jobs that run at the same time, and their limit. `jobs` is asked when the part begins, with the limit it got."""

    name: str
    seconds: float  # the most it gets
    jobs: Callable[[Place, float], list[Job]]
    least: float = 5.0  # with less it is not begun
    reserved: float = field(default=0.0)  # earlier parts leave it as much


def draw_images(archive: Path) -> None:
    """Pack noise of a colour per class as JPEG files, in the layout of an image folder."""
    dice = np.random.default_rng(0)
    folder = archive.parent / "drawn"
    for split, count in DRAWN.items():
        for label in range(CLASSES):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = dice.integers(0, 60, (32, 32, 3)) + 19 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:04}.jpg")
    with tarfile.open(archive, "w:xz", preset=0) as packed:
        for split in DRAWN:
            packed.add(folder / split, split)


def unpack_images(place: Place, limit: float) -> list[Job]:
    kit = place.work / "kit" if place.rehearses else place.kit
    jobs = [Job("images", "gpu_kit.py", ("unpack", kit, place.work)), Job("machine", "torch.utils.collect_env")]
    return jobs[:1] if place.rehearses else jobs


def see_it_work(place: Place, limit: float) -> list[Job]:
    """Run the tests, a launcher's among them, the demo, kill and resume: what must be right before anything is fast."""
    rehearses, device = place.rehearses, place.device
    tests = ("-p", "xdist.plugin", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml")
    alone = (("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),)  # whatever else is installed there
    on_cuda: tuple[object, ...] = ("-rA", "--tb=short", "--junitxml", place.results / "gpu.xml", ROOT / "tests")
    some: tuple[object, ...] = ("-n", 8, ROOT / "tests")
    if rehearses:
        on_cuda, some = ("--collect-only", ROOT / "tests/engine"), ("-n", 1, ROOT / "tests/engine/test_schedule.py")
    jobs = [
        Job(
            "demo",
            "dpm_cli",
            ("demo", "--device", device, "-o", place.runs / "demo", *(("--help",) if rehearses else ())),
        ),
        Job("gpu tests", "pytest", (*tests, "-m", "gpu", *on_cuda), alone),
        Job("tests", "pytest", (*tests, "-rf", "--tb=short", *some), alone),
        Job(
            "resume",
            "kills.py",
            ("--device", device, "--work", place.runs / "kills", "--kills", 1 if rehearses else 4)
            + (("--jobs", "train") if rehearses else ("--jobs", "train", "depgraph", "otov2")),
        ),
        Job(
            "resume, same bits",
            "kills.py",
            ("--device", device, "--work", place.runs / "kills-deterministic", "--deterministic")
            + ("--kills", 2, "--jobs", "train", "depgraph"),
        ),
    ]
    return [job for job in jobs if not (rehearses and job.name == "resume, same bits")]


def measure_steps(place: Place, limit: float) -> list[Job]:
    if place.rehearses:
        return [Job("step", "step.py", ("--only", "step", "--cases", "digits", "--turns", 1))]
    cases = ("resnet56", "resnet50", "resnet50-128")
    return [Job("step", "step.py", ("--only", "step", "--turns", 30, "--cases", *cases))]


def measure_penalties(place: Place, limit: float) -> list[Job]:
    return [Job("penalty", "step.py", ("--only", "penalty", "--turns", 1 if place.rehearses else 50))]


def measure_throughput(place: Place, limit: float) -> list[Job]:
    small = ("--turns", 1, "--steps", 1, "--batch", 8, "--settle", 0, "--arch", "resnet20")
    return [Job("throughput", "throughput.py", ("--root", place.images, *(small if place.rehearses else ())))]


def measure_compiled(place: Place, limit: float) -> list[Job]:
    """Compile the same model, which takes longer than everything else about throughput."""
    small = ("--turns", 1, "--steps", 1, "--batch", 8, "--settle", 0, "--arch", "resnet20", "--backend", "eager")
    rest = small if place.rehearses else ()
    return [Job("compiled", "throughput.py", ("--root", place.images, "--compiled", *rest))]


def measure_latency(place: Place, limit: float) -> list[Job]:
    if place.rehearses:
        return [Job("latency", "latency.py", ("torchvision:squeezenet1_1", "--turns", 2, "--side", 64))]
    models = ("torchvision:resnet50", "torchvision:vit_b_16")
    settings = ("--device", "cuda", "--turns", 50, "--batch", 1, 64)
    return [Job("latency", "latency.py", (*models, *settings))]


def profile(place: Place, limit: float) -> list[Job]:
    small = ("--arch", "resnet20", "--batch", 8, "--steps", 1) if place.rehearses else ()
    return [Job("profile", "profiles.py", ("--root", place.images, "--device", place.device, *small))]


def measure_memory(place: Place, limit: float) -> list[Job]:
    small = ("--arch", "resnet20", "--images", 120, "--batch", 16) if place.rehearses else ()
    return [Job("memory", "memory.py", ("--root", place.images, *small))]


def epoch_seconds(place: Place) -> float:
    """Return the seconds of an epoch over 50 000 images, as the throughput of our loop tells."""
    rates = [row["images / s"] for row in place.read(f"throughput-{place.device}") if row["loop"] == "dpm"]
    return 50_000 / max(rates) if rates else UNKNOWN


def compare_arms(scale: str, bases: tuple[str, ...], arms: tuple[str, ...]) -> Callable[[Place, float], list[Job]]:
    """Train dense nets and prune them with each arm, at the longest schedule of which the wanted seeds fit."""

    def jobs(place: Place, limit: float) -> list[Job]:
        shared = ("--data", place.images, "--work", place.runs / scale, "--threads", 1, "--bases", *bases)
        if place.rehearses:
            return [
                Job(
                    scale,
                    "paired.py",
                    (
                        *shared,
                        "--scale",
                        "rehearsal-vit" if scale.endswith("vit") else "rehearsal",
                        "--arms",
                        *arms[:1],
                        "--seeds",
                        1,
                    ),
                )
            ]
        share = 0.9 * limit * SHARING / epoch_seconds(place)  # epochs, of all runs together
        epochs = max(4, min(60, math.floor(share / (SEEDS * COST + 2))))
        lengths = ("--epochs", epochs, "--dense-epochs", 2 * epochs)
        settings = (*shared, "--scale", scale, "--arms", *arms, *lengths)
        return [Job(f"{scale} {i}", "paired.py", settings) for i in range(WORKERS)]

    return jobs


ARMS = ("cut", "cut, distilled", "+ SP", "+ SP + SR, distilled", "+ SP, distilled")
PARTS = {
    part.name: part
    for part in (
        Part("images", 60, unpack_images),
        Part("works", 110, see_it_work),
        Part("step", 40, measure_steps, reserved=20),
        Part("penalty", 20, measure_penalties, reserved=10),
        Part("throughput", 50, measure_throughput, reserved=30),
        Part("profile", 40, profile, reserved=20),
        Part("latency", 40, measure_latency, reserved=15),
        Part("memory", 30, measure_memory, reserved=10),
        Part("accuracy", 600, compare_arms("gpu-short", ("depgraph",), ARMS), least=60, reserved=180),
        Part("compiled", 90, measure_compiled, least=40),
        Part("vgg16", 600, compare_arms("gpu-short-vgg16", ("otov2",), ARMS), least=60),
        Part("vit", 600, compare_arms("gpu-short-vit", ("depgraph",), ARMS), least=60),
    )
}
