"""Pack what a machine with a GPU and no network lacks: packages as wheels, and images as one file.

    python benchmarks/gpu_kit.py pack .kit --images cifar10-jpeg.tar.xz    an archive of train/<class>/…, or a folder
    python benchmarks/gpu_kit.py unpack .kit work                          there: work/train/<class>/…, work/test/…

The machine has Python 3.12 on x86-64 Linux with torch, torchvision, ONNX Runtime and pytest, but not LACKING. `pip
install --no-index --no-deps --target site .kit/*.whl` makes these importable beside its own packages. Nothing of a kit
belongs into a commit.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the project and of what its tests import, without what they skip; the versions are those of constraints.txt.
LACKING = (
    "annotated-types", "filelock", "jsonschema", "jsonschema-specifications", "pydantic", "pydantic_core", "pyte",
    "referencing", "rpds-py", "thop", "torch-pruning", "typing-inspection", "typing_extensions", "wcwidth",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
MOST = 64 << 20  # bytes
IMAGES = "images.tar.xz"


def read_versions(lines: str) -> dict[str, str]:
    """Map the normalised names of a constraints file to `name==version`."""
    return {normalise(line.partition("==")[0]): line.strip() for line in lines.splitlines() if "==" in line}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(kit: Path, python: str) -> None:
    """Fetch the wheels of LACKING for another Python than this one."""
    versions = read_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wanted = [versions[normalise(name)] for name in LACKING]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *target, "-d", str(kit), *wanted]
    subprocess.run(command, check=True)


def pack_images(images: Path, archive: Path) -> None:
    """Write one compressed file of a folder's images, sorted by name, or copy an archive of them."""
    if images.is_file():
        shutil.copyfile(images, archive)
        return
    with tarfile.open(archive, "w:xz") as packed:
        for path in sorted(path for path in images.rglob("*") if path.is_file()):
            about = tarfile.TarInfo(str(path.relative_to(images)))  # nobody's name and no time: such headers compress
            about.size = path.stat().st_size
            with path.open("rb") as content:
                packed.addfile(about, content)


def pack(kit: Path, images: Path, python: str) -> int:
    """Make the kit anew; return its bytes."""
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    (kit / ".gitignore").write_text("*\n")
    download(kit, python)
    pack_images(images, kit / IMAGES)
    return sum(path.stat().st_size for path in kit.iterdir())


def unpack(kit: Path, work: Path) -> Path:
    """Return the folder that holds train/ and test/, after unpacking it into work/images if it is not there."""
    images = work / "images"
    if not images.exists():
        partial = work / "images.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with tarfile.open(kit / IMAGES) as packed:
            packed.extractall(partial, filter="data")
        top = next(partial.rglob("train")).parent  # archives may have a folder around both
        top.rename(images)
        shutil.rmtree(partial, ignore_errors=True)
    return images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("kit", type=Path)
    packing.add_argument("--images", type=Path, required=True)
    packing.add_argument("--python", default="3.12")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("kit", type=Path)
    unpacking.add_argument("work", type=Path)
    given = parser.parse_args()
    if given.command == "unpack":
        print(unpack(given.kit, given.work))
        return 0
    size = pack(given.kit, given.images, given.python)
    print(f"{given.kit}: {size / 2**20:.1f} MiB in {len(list(given.kit.iterdir())) - 1} files")
    return 0 if size < MOST else 1


if __name__ == "__main__":
    sys.exit(main())
