"""A removal in the middle of a run that changes outputs costs a group, and no training."""

import pytest
from test_story import FP32, Net, go, make_recipe
from test_story import splits as splits  # a fixture

from dpm_cli.events import Note


class Counting(Net):
    """Scales by the number of its inner channels."""

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        inner = self.inner_norm(self.inner(x)).relu()
        return self.head((x + self.back(inner * (inner.shape[1] / 12))).mean((2, 3)))


@pytest.fixture
def _blind(monkeypatch):
    """Nothing compares outputs before the training."""
    monkeypatch.setattr("dpm_cli.graph.rehearsal.make_lively", lambda *_: None)


@pytest.mark.usefixtures("_blind")
def test_a_run_keeps_what_changes_outputs_and_delivers(tmp_path, splits):
    recipe = make_recipe("prune.target.macs=0.35", "prune.min_keep=0.1")
    run, events, report = go(tmp_path, recipe, splits, model=Counting().eval(), precision=FP32)
    assert {kept.layer: kept.macs for kept in report.kept}["inner"] == 9 * 8 * 12 * 8 * 8
    assert any("inner is kept whole from now on" in event.text for event in events if isinstance(event, Note))
    assert any("please report this model" in note for note in report.notes)
    assert report.target.is_met
    assert report.compact_difference <= 1e-5
    assert run.subject.model.inner.out_channels == 12
    assert (tmp_path / "slim.pt").exists()


@pytest.mark.usefixtures("_blind")
@pytest.mark.thorough
def test_a_run_whose_target_needs_what_has_to_stay_delivers_and_says_so(tmp_path, splits):
    recipe = make_recipe("prune.target.macs=0.08", "prune.min_keep=0.1")
    _, _, report = go(tmp_path, recipe, splits, model=Counting().eval())
    assert not report.target.is_met
    assert (tmp_path / "slim.pt").exists()
    assert (tmp_path / "report.json").exists()


@pytest.mark.thorough
def test_before_training_it_is_found_by_the_rehearsal(tmp_path, splits):
    _, events, report = go(tmp_path, make_recipe("prune.target.macs=0.7"), splits, model=Counting().eval())
    assert "inner" in {kept.layer for kept in report.kept}
    assert not any("from now on" in event.text for event in events if isinstance(event, Note))
