import resource
import sys

import pytest
import torch

from dpm_cli.engine import allocator
from dpm_cli.engine.allocator import keeping_freed_memory

BLOCKS, BYTES = 12, 16 << 20  # together more than glibc keeps by itself


def page_faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(BYTES // 4) for _ in range(BLOCKS)]
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(allocator.ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_used_again_and_given_back_in_the_end():
    page_faults_of_a_step()
    usual = page_faults_of_a_step()
    with keeping_freed_memory():
        page_faults_of_a_step()
        again = page_faults_of_a_step()
        kept = resident_bytes()
    assert again < usual / 4
    assert kept - resident_bytes() > BLOCKS * BYTES / 2
    assert page_faults_of_a_step() > usual / 4  # as before


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_another_c_library_is_left_alone(monkeypatch, platform):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    with keeping_freed_memory():
        torch.ones(3)
