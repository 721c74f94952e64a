from functools import partial

import pytest
from small_runs import load_digits

from dpm_cli.measure import measure_in_turns


@pytest.fixture(scope="session")
def splits():
    return load_digits()


@pytest.fixture(autouse=True)
def _short_latencies(monkeypatch):
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
