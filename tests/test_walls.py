"""How large a file, a function, a class and the root of the package may become, and that the README's map is true."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dpm_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, LINES_OF_A_CLASS, FILES_AT_THE_ROOT = 400, 60, 250, 8


def too_long(path: Path) -> Iterator[str]:
    """What in a file is over its limit, with its place and its lines."""
    text = path.read_text(encoding="utf-8")
    name, lines = path.relative_to(ROOT), len(text.splitlines())
    if lines > LINES_OF_A_FILE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                most = LINES_OF_A_FUNCTION
            case ast.ClassDef():
                most = LINES_OF_A_CLASS
            case _:
                continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1  # without decorators
        if lines > most:
            yield f"{name}:{node.lineno} {node.name}: {lines} lines"


def test_files_functions_and_classes_are_short() -> None:
    assert [found for path in FILES for found in too_long(path)] == []


def test_root_of_the_package_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= FILES_AT_THE_ROOT


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\n" * 400, []), ("\n" * 401, ["401 lines"]),
        ("@cached\n" * 9 + "def f():\n" + "    1\n" * 59, []), ("def f():\n" + "    1\n" * 60, ["1 f: 61 lines"]),
        ("class C:\n" + "    a = 1\n" * 249, []), ("class C:\n" + "    a = 1\n" * 250, ["1 C: 251 lines"]),
        ("class C:\n    async def f():\n" + "        1\n" * 60, ["2 f: 61 lines"]),
    ],
    ids=["file", "long file", "function", "long function", "class", "long class", "long method"],
)  # fmt: skip
def test_limits_are_inclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: list[str]) -> None:
    monkeypatch.setattr("test_walls.ROOT", tmp_path)
    (tmp_path / "file.py").write_text(text)
    assert [each.removeprefix("file.py:").strip() for each in too_long(tmp_path / "file.py")] == found


def folders_on_the_map(readme: str) -> set[str]:
    """Every `name/` that begins an entry of the indented block under "Where things are".

    An entry begins its line, or follows another after two spaces or more; nested ones count by their last part.
    """
    _, _, rest = readme.partition("## Where things are")
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    block = [line for line in section.splitlines() if line.startswith("    ")]
    return {found[1] for line in block for found in re.finditer(r"(?:^|\s{2,})(?:\w+/)*(\w+)/(?=\s|$)", line)}


def test_map_of_the_readme_names_every_folder_and_no_other() -> None:
    named = folders_on_the_map((ROOT / "README.md").read_text(encoding="utf-8"))
    there = {path.parent.relative_to(PACKAGE).name for path in FILES} - {""}
    assert there - named == set(), "missing on the map"
    others = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert named - there - others == set(), "not in the repository"
