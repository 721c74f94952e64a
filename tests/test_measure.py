import itertools
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.errors import UsageError
from dpm_cli.measure import (
    ATTEMPTS,
    Latency,
    _find_doubt,
    _load,
    count_bytes,
    count_macs,
    count_parameters,
    hardware,
    measure_in_turns,
    measure_latency,
)


class Attention(nn.Module):
    """One encoder layer over the columns of an image: D channels, L tokens."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.layer(images.flatten(2).transpose(1, 2))
        return tokens


@pytest.mark.parametrize(
    ("module", "macs"),
    [
        (nn.Conv2d(3, 5, 3, padding=1), 9 * 3 * 5 * 8 * 8),
        (nn.Conv2d(3, 5, 3, padding=1, stride=2), 9 * 3 * 5 * 4 * 4),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 9 * 3 * 6 * 8 * 8 // 3),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8)), (3 * 8 + 25 * 8) * 8 * 8),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), 4 * 3 * 4 * 8 * 8),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), 192 * 7),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_macs_follow_the_closed_form(module: nn.Module, macs: int, batch: int) -> None:
    assert count_macs(module, torch.randn(batch, 3, 8, 8)) == macs


@pytest.mark.parametrize("training", [True, False])
def test_macs_of_attention_are_complete_in_any_mode(training: bool) -> None:
    width, tokens, hidden = 16, 64, 32
    projections = 4 * tokens * width * width
    scores_and_sums = 2 * tokens * tokens * width
    mlp = 2 * tokens * width * hidden
    module = Attention(width, heads=4, hidden=hidden).train(training).requires_grad_(training)
    assert count_macs(module, torch.randn(2, width, 8, 8)) == projections + scores_and_sums + mlp


def test_counting_leaves_the_world_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout()))
    module[1].eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    keys = [list(vars(part)) for part in module.modules()]
    for counter in ("flop_counter", "thop"):
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            try:
                count_macs(module, torch.randn(1, 3, 8, 8), counter)
                assert torch.backends.mha.get_fastpath_enabled() == enabled
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
    assert [part.training for part in module.modules()] == [True, True, False, True, True]
    assert [list(vars(part)) for part in module.modules()] == keys
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert not any(part._forward_hooks for part in module.modules())


def test_macs_are_the_same_in_inference_mode() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with torch.inference_mode():
        assert count_macs(module, torch.randn(1, 3, 2, 2)) == 60


def test_thop_agrees_on_convolutions_and_adds_norms() -> None:
    image = torch.randn(2, 3, 8, 8)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4))
    assert count_macs(module, image, "thop") == count_macs(module, image)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    assert count_macs(module, image, "thop") > count_macs(module, image)


def test_missing_thop_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(UsageError, match="use counter: flop_counter"):
        count_macs(nn.Conv2d(3, 5, 3), torch.randn(1, 3, 8, 8), "thop")


def test_shared_parameters_count_once_and_buffers_not() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    assert count_parameters(module) == 16 + 16 + 8
    module[1].weight = module[0].weight
    assert count_parameters(module) == 16 + 8


def test_bytes_grow_with_the_weights_and_not_with_gradients() -> None:
    small, large = nn.Linear(100, 100, bias=False), nn.Linear(200, 100, bias=False)
    assert count_bytes(large) - count_bytes(small) == pytest.approx(100 * 100 * 4, abs=500)
    before = count_bytes(small)
    small(torch.randn(1, 100)).sum().backward()
    assert count_bytes(small) == before


def sleeper(milliseconds: float) -> Callable[[Tensor], None]:
    return lambda images: time.sleep(milliseconds / 1e3)


def test_latency_is_the_median_between_its_quartiles() -> None:
    latency = measure_latency(sleeper(2), torch.zeros(1), seconds=0.05)
    assert 2 <= latency.low_ms <= latency.median_ms <= latency.high_ms
    assert 10 <= latency.runs <= 26
    assert latency.threads == 1


def test_slow_run_is_still_called_often_enough() -> None:
    assert measure_latency(sleeper(5), torch.zeros(1), seconds=0, least=7).runs == 7


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda images, name=name: order.append(name) for name in ("dense", "slim")}
    latencies = measure_in_turns(runs, torch.zeros(1), seconds=0.01, least=10, turns=3)
    changes = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert changes[:8] == ["dense", "slim"] * 4  # to warm up, then three turns
    assert min(latency.runs for latency in latencies.values()) >= 10


def test_a_call_that_waits_for_a_core_is_measured_again_and_doubted() -> None:
    calls = []
    latency = measure_latency(lambda images: (calls.append(1), time.sleep(0.002)), torch.zeros(1), seconds=0, least=5)
    assert latency.doubt is not None
    assert re.match(
        r"(the quartiles .*; )?it waited for a core for \d+ % of the time \(load .* on \d+ cores\)", latency.doubt
    )
    assert len(calls) == 3 + ATTEMPTS * 5


def test_a_wide_spread_is_doubted() -> None:
    pauses = itertools.cycle([0.001, 0.02])
    latency = measure_latency(lambda images: time.sleep(next(pauses)), torch.zeros(1), seconds=0, least=8)
    assert "the quartiles are" in (latency.doubt or "")


def test_threads_that_wait_for_each_other_are_doubted() -> None:
    """As two threads on a busy machine: 200 times slower than one, but every call alike."""
    torch.set_num_threads(2)
    try:
        latency = measure_latency(
            lambda images: time.sleep(0.02 if torch.get_num_threads() > 1 else 0.0001),
            torch.zeros(1),
            seconds=0,
            least=5,
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert latency.threads == 2
    assert "ms, 2 mostly wait for each other" in (latency.doubt or "")


def test_a_calm_attempt_is_not_doubted_and_ends_the_measurement() -> None:
    """Three attempts of which one is calm: enough even while other programs run."""
    latency = Latency(2.0, 1.9, 2.1, runs=9, threads=1, processor_ms=2.0)
    assert _find_doubt(latency, 0.99, None, on_cpu=True) is None
    assert _find_doubt(replace(latency, threads=2), 1.9, 3.0, on_cpu=True) is None or _load() > 4


def test_latency_is_measured_in_eval_mode_without_gradients() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Watching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((self.training, torch.is_inference_mode_enabled(), bool(images * 0.5 == 0)))
            return images

    module = Watching()
    denormal = torch.tensor(1e-40)
    measure_latency(module, denormal, seconds=0)
    assert set(seen) == {(False, True, True)}  # denormals are flushed meanwhile
    assert module.training
    assert denormal * 0.5 != 0


def test_hardware_names_the_machine_and_the_versions() -> None:
    found = hardware()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert all(found[name] for name in ("cpu", "cores", "python", "onnxruntime"))


def test_macs_of_a_module_that_hands_a_parameter_to_another() -> None:
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            token = self.token.expand(len(x), -1)
            return nn.Sequential(self.inner)(token) + x.sum()

    module = Hands()
    assert count_macs(module, torch.zeros(1, 3, 2, 2)) == 20
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_processor_time_leaves_out_waiting() -> None:
    waits = measure_latency(lambda _: time.sleep(0.003), torch.zeros(1), seconds=0.03)
    assert waits.processor_ms < 1 < 3 <= waits.median_ms


def test_processor_time_leaves_out_what_interruptions_add() -> None:
    spins = itertools.cycle([1, 1, 40])  # every third call is disturbed

    def spin(_: Tensor) -> None:
        end = time.process_time() + 0.001 * next(spins)
        while time.process_time() < end:
            pass

    assert measure_latency(spin, torch.zeros(1), seconds=0, least=9).processor_ms < 5
