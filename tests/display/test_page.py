"""The page of a run: one file without network, charts with something in them, words beside every picture."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from made_up_report import make_report

from dpm_cli.display.charts import VARIABLES, Chart, draw_charts
from dpm_cli.display.history import read_history
from dpm_cli.display.page import write_page
from dpm_cli.errors import OutputError
from dpm_cli.events import EpochEnded, Event, Mistaken, RoundStarted, UnitsWatched

PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
CHARTS = ["Widths of the layers", "The lives of the units", "Norms of a sample of units", "Loss and accuracy",
          "Learning rate", "Latency"]  # fmt: skip


def events() -> list[Event]:
    told: list[Event] = []
    for number in (1, 2):
        step = 20 * (number - 1)
        told.append(RoundStarted("train", step, number, 2, 8, False, 1, 1, 1))
        for age in range(1, 11):
            norms = {"3": 1 - age / 10, "5": 0.7}
            told.append(UnitsWatched("train", step + age, number, 8 - number, 0, number, 8 * number, norms, ("5",)))
        told.append(EpochEnded("train", number, 2, step + 20, 1.5 / number, 80.0 + number, 0.05, 500.0, 0.0, 1.0))
    told += [EpochEnded("finetune", number, 2, 20 * number, 0.5, None, 0.01, 500.0, 0.0, 1.0) for number in (1, 2)]
    return [*told, Mistaken(7, "<script>alert(1)</script>", "dog & cat", 0.9, 0.5, PICTURE)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text(make_report().to_json())
    lines = [json.dumps(event.to_dict()) for event in events()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text("seed: 0  # <b>\n")
    return tmp_path


def charts(folder: Path) -> list[Chart]:
    return draw_charts(make_report(), read_history(folder / "metrics.jsonl"))


def test_steps_of_all_stages_are_on_one_axis(folder: Path) -> None:
    history = read_history(folder / "metrics.jsonl")
    assert [entry["at"] for entry in history.epochs] == [20, 40, 60, 80]
    assert history.stages == [("train", 0), ("finetune", 40)]
    assert history.steps == 80


def test_stages_of_one_name_follow_each_other(folder: Path) -> None:
    told: list[Event] = [
        *(EpochEnded("tick", 1, 1, 6, 0.5, None, 0.01, 500.0, 0.0, 1.0) for _ in range(3)),
        EpochEnded("tock", 1, 2, 6, 0.5, None, 0.01, 500.0, 0.0, 1.0),
        RoundStarted("tock", 6, 1, 1, 8, False, 1, 1, 1),
        EpochEnded("tock", 2, 2, 12, 0.5, None, 0.01, 500.0, 0.0, 1.0),
        RoundStarted("tock", 0, 1, 1, 8, False, 1, 1, 1),
        EpochEnded("tock", 1, 1, 12, 0.5, None, 0.01, 500.0, 0.0, 1.0),
    ]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(event.to_dict()) for event in told))
    history = read_history(folder / "metrics.jsonl")
    assert [entry["at"] for entry in history.epochs] == [6, 12, 18, 24, 30, 42]
    assert [entry["at"] for entry in history.rounds] == [24, 30]
    assert history.stages == [("tick", 0), ("tick", 6), ("tick", 12), ("tock", 18), ("tock", 30)]


@pytest.mark.thorough
def test_every_chart_is_drawn_and_told_in_words(folder: Path) -> None:
    drawn = charts(folder)
    assert [chart.title for chart in drawn] == CHARTS
    for chart in drawn:
        assert len(chart.text) > 30
        tree = ElementTree.fromstring(chart.svg.replace("xlink:href", "href"))
        shapes = [each for each in tree.iter() if each.tag.endswith("path") and "var(--" in each.get("style", "")]
        assert len(shapes) > 5


@pytest.mark.thorough
def test_charts_take_all_colours_from_the_page_and_share_no_names(folder: Path) -> None:
    drawn = charts(folder)
    for chart in drawn:
        assert set(re.findall(r"#[0-9a-f]{6}", chart.svg)) <= {"#000000"}, chart.title
        assert not any(colour in chart.svg for colour in VARIABLES)
    ids = [name for chart in drawn for name in re.findall(r'\sid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids))
    for chart in drawn:
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', chart.svg)) <= set(ids)


@pytest.mark.thorough
def test_the_page_holds_everything_and_asks_nobody(folder: Path) -> None:
    page = write_page(folder).read_text(encoding="utf-8")
    for said in (*CHARTS, "125.7 M", "something to know", "output of the model", "seed: 0", PICTURE, "dog &amp; cat"):
        assert said in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "@import" not in page
    assert page.count("<figure") == len(CHARTS) + 1
    assert len(page) < 1_000_000


@pytest.mark.thorough
def test_a_chart_is_the_same_every_time(folder: Path) -> None:
    first = charts(folder)[0]
    assert first == charts(folder)[0]


def test_without_a_history_the_page_shows_what_there_is(folder: Path) -> None:
    older = '{"event": "units", "stage": "train", "step": 3, "norms": {}}'
    (folder / "metrics.jsonl").write_text(f'not json\n[]\n{{"event": "epoch"\n{older}\n')
    (folder / "recipe.yaml").unlink()
    page = write_page(folder).read_text(encoding="utf-8")
    assert "Widths of the layers" in page
    assert "Learning rate" not in page


def test_nothing_pruned_and_nothing_measured_is_no_reason_to_fail(folder: Path) -> None:
    report = make_report()
    bare = replace(report.dense, latency={})
    page = write_page(folder, replace(report, dense=bare, slim=bare, widths=[]))
    assert "Latency" not in page.read_text(encoding="utf-8")


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="give the folder of a finished run"):
        write_page(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(folder: Path, width: int) -> None:
    shot = folder / "shot.png"
    said = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},3000", f"--screenshot={shot}",
         write_page(folder).as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stderr  # fmt: skip
    assert "CONSOLE" not in said
    assert shot.stat().st_size > 50_000  # an empty page is far smaller
