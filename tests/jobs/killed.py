"""Jobs in processes of their own that are killed at a chosen moment, as `kill -9` does it."""

import json
import subprocess
import sys
import textwrap

CODE = """
    import itertools, json, os, signal, sys, torch
    torch.set_num_threads(1)
    import dpm_cli
    from dpm_cli import files
    from dpm_cli.engine import checkpoint

    job, given, settings, moment, number = sys.argv[1:]
    count = itertools.count(1)

    def die_in_time():
        if next(count) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(moment_of_this, function):
        def called(*given):
            if moment == moment_of_this:
                die_in_time()
            return function(*given)
        return called

    class Half:  # of what is written to a checkpoint
        def __init__(self, file):
            self.hashing = checkpoint_file(file)
            self.sha256, self.flush = self.hashing.sha256, self.hashing.flush

        def write(self, data):
            if moment == "half" and len(data) > 100 and next(count) == int(number):
                self.hashing.write(data[: len(data) // 2])
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.hashing.write(data)

    checkpoint_file, checkpoint._HashingFile = checkpoint._HashingFile, Half
    os.replace, os.fsync = before("rename", os.replace), before("flush", os.fsync)
    tell = before("event", lambda event: None)
    getattr(dpm_cli, job)(*json.loads(given), **json.loads(settings), resume=True, on_event=tell)
"""


def start_killed(job, *given, moment="never", number=0, **settings):
    """Resume `dpm_cli.JOB(*given, **settings)`, and kill it before the `number`-th event, rename or flush, or half-way
    through the `number`-th piece of a checkpoint. Returns its exit code.
    """
    values = [json.dumps(each, default=str) for each in (given, settings)]
    command = [sys.executable, "-c", textwrap.dedent(CODE), job, *values, moment, str(number)]
    return subprocess.run(command, timeout=300, check=False).returncode
