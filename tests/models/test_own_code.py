import os
import sys
from pathlib import Path

import pytest
from torch import nn

from dpm_cli.errors import RecipeError
from dpm_cli.models import build

SHAPE = (3, 32, 32)
CODE = """
from functools import partial
from torch import nn

def plain():
    return nn.Linear(3, 4)

def sized(num_classes):
    return nn.Linear(3, num_classes)

class Net(nn.Linear):
    def __init__(self, classes=2):
        super().__init__(3, classes)

def other():
    return 7

def demanding(width):
    return nn.Linear(3, width)

def leaving():
    raise SystemExit("bye\\nbye")

constant = 3
made = partial(nn.Linear, 3, 5)
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder that is not on sys.path, under a name of its own."""
    name = f"own_code_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(("function", "outputs"), [("plain", 4), ("sized", 9), ("Net", 9), ("made", 5)])
def test_function_in_the_current_folder_is_called_with_the_classes_it_asks_for(
    own_code: str, function: str, outputs: int
) -> None:
    before = list(sys.path)
    module = build(f"{own_code}:{function}", classes=9, shape=SHAPE)
    assert isinstance(module, nn.Linear)
    assert module.out_features == outputs
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "has no function 'absent'"),
        ("constant", "has no function 'constant'"),
        ("other", "returned a int"),
        ("demanding", "missing 1 required positional argument: 'width'"),
        ("leaving", "SystemExit: bye bye"),
    ],
)
def test_function_that_gives_no_module_is_one_line(own_code: str, function: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build(f"{own_code}:{function}", classes=9, shape=SHAPE)
    assert "\n" not in str(caught.value)


def test_module_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_own_code.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        build("broken_own_code:net", classes=9, shape=SHAPE)
    with pytest.raises(RecipeError, match=f"no module 'absent_own_code' in {os.getcwd()}"):
        build("absent_own_code:net", classes=9, shape=SHAPE)


@pytest.mark.parametrize("arch", [":", "a:", ":b", "a b:c", "..a:b", "a:b:c", "a/b:c"])
def test_malformed_name_lists_the_forms(arch: str) -> None:
    with pytest.raises(RecipeError, match=r"package.module:function"):
        build(arch, classes=9, shape=SHAPE)
