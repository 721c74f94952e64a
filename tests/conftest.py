"""Settings for every test, and a way to run several processes."""

import os
import socket
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny nets run many times slower on two threads than on one
settings.register_profile("busy", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is thorough
def pytest_collection_modifyitems(items):
    """Of a test marked `every(n)` the default run takes each n-th case; the others are `thorough`."""
    seen = Counter()
    for item in items:
        if every := item.get_closest_marker("every"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % every.args[0]:
                item.add_marker("thorough")
            seen[test] += 1


@pytest.fixture
def together():
    """Run Python code in several processes of one run, each with its rank, as a launcher does.

    Returns (exit code, stdout, stderr) of each.
    """
    started = []

    def run(code, *arguments, size=2, timeout=400):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        for rank in range(size):
            environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        outputs = [process.communicate(timeout=timeout) for process in started[-size:]]
        return [(process.returncode, *output) for process, output in zip(started[-size:], outputs)]

    yield run
    for process in started:
        process.kill()
        process.wait()
