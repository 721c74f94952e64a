"""The table of a run: right numbers, nothing cut off, readable in a pipe."""

import re
from dataclasses import replace

import pytest
from made_up_report import make_report

from dpm_cli.cli.tables import fold_path, print_report
from dpm_cli.display.facts import describe_kept, describe_widths, disappointments, praise, rows, title, wrap, wrap_words
from dpm_cli.report import KeptLayer, Measured, Milliseconds, Report, TargetReport, Width


def printed(report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    print_report(report)
    return capsys.readouterr().out


def test_the_table_compares_dense_and_slim(report: Report) -> None:
    assert rows(report) == [
        ("MACs", "125.7 M", "59.0 M", "−53.1 %  2.13×"),
        ("parameters", "855.8 K", "431.0 K", "−49.6 %  1.99×"),
        ("test accuracy", "93.53 %", "93.10 %", "−0.43 points"),
        ("state dict", "3.46 MB", "1.80 MB", "−48.0 %  1.92×"),
        ("latency, torch", "10.0 ms", "8.00 ms", "1.25× faster"),
        ("latency, ONNX Runtime", "3.00 ms", "1.50 ms", "2.00× faster"),
    ]


def test_in_a_pipe_nothing_is_cut_off_and_nothing_is_coloured(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(report, capsys, monkeypatch)
    for row in rows(report):
        assert re.search(r" +".join(map(re.escape, row)), text), row
    assert "…" not in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines()[1:])) <= 80  # the title is never broken


def test_below_the_table_stands_all_that_a_user_needs(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(report, capsys, monkeypatch)
    for part in (
        "1120 in all: 540 chosen, 22 released, 518 removed",
        "layer1.8.conv1 16→8",
        "1 unchanged",
        "linear: output of the model",
        "agree to 1e-07",
        "out/slim.pt",
        "out/model.onnx  1.90 MB, agrees with the slim model to 3e-07",
        "train 12 min 34 s",
        "finetune 3 h 05 min",
        "seed 0",
        "something to know",
    ):
        assert part in text, part
    assert "FLOP" not in text


def test_the_title_says_what_was_asked_and_reached(report: Report) -> None:
    assert title(report) == ("resnet56, depgraph + DPM, target macs 0.47: 46.9 % left (59.0 M of at most 59.1 M)")
    channels = replace(report, arch=None, target=TargetReport("channels", 600, 600, 1120, 592))
    assert title(channels) == "model, depgraph + DPM, target channels 600: 52.9 % left (592 of at most 600)"


def test_the_title_says_that_a_drop_allowed_no_removal(report: Report) -> None:
    whole = replace(report, target=TargetReport("drop", 1.0, 1000, 1000, 1000))
    assert title(whole) == "resnet56, depgraph + DPM, target drop 1 point: nothing could be removed"


def test_a_speed_up_far_below_the_macs_is_said(report: Report) -> None:
    (sentence,) = disappointments(report)
    assert "torch 1.25×" in sentence
    assert "2.13×" in sentence
    assert "ONNX Runtime" not in sentence  # 2.00 × of 2.13 × is what one may expect


def test_a_speed_up_like_that_of_the_macs_is_not_remarked() -> None:
    fast = Measured(59_020_000, 431_000, 1, 93.0, 0.3, {"torch": Milliseconds(4.9, 4.9, 4.9)})
    assert disappointments(make_report(slim=fast)) == []


def test_a_report_without_accuracy_and_latency_can_be_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Measured(1000, 100, 400, None, None, {})
    text = printed(make_report(dense=bare, slim=bare, kept=[], exports=[], notes=[]), capsys, monkeypatch)
    assert "accuracy" not in text
    assert "latency" not in text


def test_long_paths_are_not_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/a/very/long/folder" * 8 + "/slim.pt"
    assert path in printed(make_report(files={"slim": path}), capsys, monkeypatch)


def test_names_with_brackets_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(make_report(files={"slim": "[red]out[/red]/slim.pt"}, notes=["[bold]"]), capsys, monkeypatch)
    assert "[red]out[/red]/slim.pt" in text
    assert "[bold]" in text


def test_many_layers_are_counted_instead_of_listed() -> None:
    lines = describe_widths([Width(f"features.{i}", 64, 32) for i in range(200)], 70)
    text = " ".join(lines)
    assert "140 more in report.json" in text
    assert "features.59 64→32" in text
    assert max(map(len, lines)) <= 70


def test_kept_layers_are_gathered_by_reason() -> None:
    kept = [KeptLayer(f"mix{i}", "mixes channels") for i in range(9)] + [KeptLayer("fc", "output of the model")]
    assert describe_kept(kept, 70) == ["mix0, mix1, mix2 and 6 more: mixes channels", "fc: output of the model"]


def test_each_reason_to_keep_layers_whole_says_its_share_of_the_macs() -> None:
    norm = "losing a channel changes the statistics of the others"
    kept = [KeptLayer("head", "output of the model", 5)]
    kept += [KeptLayer(f"block{i}", f"block{i}.norm: layer norm: {norm}", 20) for i in range(2)]
    assert describe_kept(kept, 120, macs=100) == [
        f"40.0 % of MACs, block0, block1: layer norm: {norm}",
        "5.0 % of MACs, head: output of the model",
    ]


def test_items_are_never_broken_when_wrapped() -> None:
    assert wrap(["aa 1→2", "bb 3→4", "cc 5→6"], 15) == ["aa 1→2, bb 3→4,", "cc 5→6"]
    assert wrap([], 10) == []


def test_no_number_is_parted_from_its_unit() -> None:
    assert wrap_words("it took 0.969 ms, 51 % of it", 13) == ["it took", "0.969 ms,", "51 % of it"]


def test_a_path_is_folded_after_a_separator() -> None:
    assert fold_path("out/some/model.onnx", 12) == "out/some/\nmodel.onnx"


def test_a_slow_model_is_told_which_of_its_widths_are_to_blame() -> None:
    slow = replace(make_report().slim, latency={"torch": Milliseconds(9.9, 9.8, 10.0)})
    (sentence,) = disappointments(
        make_report(slim=slow, widths=[Width("a", 64, 33), Width("b", 64, 32), Width("c", 10, 10)])
    )
    assert "Not a multiple of 8 wide: a (33). Runtimes are slow" in sentence
    (sentence,) = disappointments(make_report(slim=slow, widths=[Width("b", 64, 32)]))
    assert "overhead and memory" in sentence


def test_praise_says_what_was_gained_and_its_price() -> None:
    gained = "2.1× fewer multiply-accumulates, 1.9× smaller, 2.0× faster in ONNX Runtime"
    assert praise(make_report()) == f"Gained: {gained}, for 0.43 points of accuracy."
    report = make_report()
    better = replace(report.slim, accuracy=94.0, latency={})
    assert praise(make_report(slim=better)).endswith("1.9× smaller, at no loss of accuracy.")
