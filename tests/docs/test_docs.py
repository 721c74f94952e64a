"""The docs build without a warning; their commands exist; their snippets run, page by page, in an empty folder."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from PIL import Image

from dpm_cli.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
ELSEWHERE = {  # marks in the README -> the test that runs the block
    "demo": ".ci/run",
    "tests": ".ci/run",
    "loop": "tests/cli/test_compare.py",
    "onnxruntime": "tests/jobs/test_predict.py",
    "load": "tests/jobs/test_predict.py",
    "own-loop": "tests/docs/test_docs.py",
    "recipe": "tests/docs/test_docs.py",
}


class Block(NamedTuple):
    """One fenced block: its language, its title, the comment before it and its lines."""

    language: str
    title: str
    mark: str
    code: str


def blocks(page: Path) -> Iterator[Block]:
    fence = re.compile(
        r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>\w+)"
        r'(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^ *```',
        re.DOTALL | re.MULTILINE,
    )
    for found in fence.finditer(page.read_text(encoding="utf-8")):
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        yield Block(found["language"], found["title"] or "", found["mark"] or "", code)


def make_photos(folder: Path) -> None:
    """Three classes of twenty photos of odd sizes, told apart by colour, and one that nobody has seen."""
    rng = np.random.default_rng(0)
    for name, colour in {"cat": (200, 60, 60), "dog": (60, 200, 60), "owl": (60, 60, 200)}.items():
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            height, width = rng.integers(60, 90, 2)
            pixels = np.clip(rng.normal(colour, 50, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.jpg")
    Image.fromarray(pixels).save(folder / "photo.jpg")


# Pages show commands as people type them; here, every training is as short as it can be.
SHORT = "--set train.epochs=1 --set finetune.epochs=1 --set dense.epochs=1"
SHIM = f"""#!/bin/sh
case "$1" in
  train|prune) exec {sys.executable} -m dpm_cli "$@" {SHORT} ;;
  *) exec {sys.executable} -m dpm_cli "$@" ;;
esac
"""


def run_page(page: Path, folder: Path) -> int:
    """Run the blocks of a page in order; return how many ran."""
    make_photos(folder)
    programs = folder / ".bin"
    programs.mkdir()
    (programs / "dpm").write_text(SHIM)
    (programs / "dpm").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "DPM_CACHE": str(folder / ".cache")}
    ran = 0
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.code)
            continue
        if block.mark.startswith("not run: ") or block.language == "text":
            continue
        commands = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-W", "ignore", "-c"]}
        ended = subprocess.run(
            [*commands[block.language], block.code],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, f"{block.code}\n{ended.stdout[-1000:]}\n{ended.stderr[-1000:]}"
        ran += 1
    return ran


RUNNABLE = [page for page in PAGES if any(not block.mark.startswith("not run: ") for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_everything_on_a_page_runs(page: Path, tmp_path: Path) -> None:
    assert run_page(page, tmp_path)


def test_no_block_is_left_out_without_a_reason() -> None:
    """Docs run unless they say why not; blocks of the README name themselves, and a test that runs them."""
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("sh", "python", "yaml", "text"), page
            assert block.language != "yaml" or block.title, f"{page} shows settings that no command reads"
    for block in blocks(README):
        assert block.mark in ELSEWHERE, f"README: {block.code}"
        assert (ROOT / ELSEWHERE[block.mark]).exists()


def test_the_loop_of_the_docs_is_that_of_the_readme() -> None:
    loops = [block.code for page in (README, ROOT / "docs/how-to/batch-scripts.md") for block in blocks(page)]
    shown = [code for code in loops if "for model in" in code]
    assert len(shown) == 2
    assert shown[0] == shown[1]


def test_the_recipe_of_the_readme_can_be_read(tmp_path: Path) -> None:
    from dpm_cli.recipe import load_recipe

    (block,) = (block for block in blocks(README) if block.mark == "recipe")
    (tmp_path / "mine.yaml").write_text(block.code)
    assert load_recipe(tmp_path / "mine.yaml").prune.target.macs == 0.5


@pytest.mark.thorough
def test_the_loop_of_your_own_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torchvision.models import resnet18

    import dpm_cli

    (block,) = (block for block in blocks(README) if block.mark == "own-loop")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(3, (2,))) for _ in range(4)]
    code = block.code.replace("steps=len(loader) * epochs", "steps=4")
    names = {"model": resnet18(num_classes=3), "example": batches[0][0], "batches": batches}
    exec(code, names | {"dpm_cli": dpm_cli, "torch": torch, "criterion": torch.nn.CrossEntropyLoss()})
    assert (tmp_path / "model.onnx").exists()


def mentioned() -> list[tuple[str, str]]:
    """Every command of dpm that the README or a page shows, with the page."""
    found = []
    for page in (README, *PAGES):
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for line in re.findall(r"(?:^\s*|`|\bbin/)dpm ((?:[a-z]+)\b[^`\n|#(]*)", text, flags=re.MULTILINE):
            found.append((str(page.relative_to(ROOT)), line))
    return found


def test_every_command_that_is_shown_exists_with_its_options() -> None:
    group: Any = typer.main.get_command(app)
    shown = mentioned()
    assert len(shown) > 30
    for page, line in shown:
        name, *words = line.split()
        assert name in group.commands, f"{page}: dpm {line}"
        offered = {option for each in group.commands[name].params for option in each.opts} | {"-h", "--help"}
        for word in words:
            option = word.strip("[]…,.;:").partition("=")[0]
            assert not option.startswith("-") or option in offered, f"{page}: dpm {line}"


def test_the_references_name_every_setting_and_command() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    settings = generate.on_page_markdown(generate.SETTINGS)
    for name in ("prune", "round_to", "max_drop", "resize", "track", "rectify"):
        assert f"| `{name}` |" in settings
    assert "|  |" not in settings.replace("\n", ""), "a setting without a description"
    commands = generate.on_page_markdown(generate.COMMANDS)
    group: Any = typer.main.get_command(app)
    assert all(f"## dpm {name}\n" in commands for name in group.commands)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "Prune a trained model to the recipe" in page


def test_the_dockerfile_copies_what_there_is_and_pleases_the_linter() -> None:
    """No daemon builds it here, so its lines are checked one by one."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert source.removeprefix("./") not in left_out, line
    assert 'ENTRYPOINT ["dpm"]' in lines
    linter = Path(sys.executable).with_name("hadolint")
    if linter.exists():
        ended = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stdout
