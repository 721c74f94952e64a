"""A made-up report, and `dpm` in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from made_up_report import make_report

from dpm_cli.cli.app import main
from dpm_cli.report import Report


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Dpm = Callable[..., Ended]


@pytest.fixture
def dpm(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dpm]:
    """`dpm(*arguments)`, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return Ended(code, *capsys.readouterr())

    yield run
    torch.set_flush_denormal(False)  # a run switches it on, for the whole process


@pytest.fixture
def report() -> Report:
    return make_report()
