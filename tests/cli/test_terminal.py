"""What a person sees: a real terminal of several widths, without colours, dumb, or of an old encoding."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest

from dpm_cli.cli.bars import fit

SCENE = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from dpm_cli.cli.signs import make_output_safe
from dpm_cli.cli.progress import follow
from test_progress import *
make_output_safe()
with follow(quiet=False, as_json=False) as tell:
    tell(PhaseBegan("load", "loading the images"))
    tell(START)
    tell(StageBegan("finetune"))
    tell(replace(STEP, stage="finetune", step=45, steps=100, epoch=4, epochs=10))
    tell(replace(EPOCH, stage="finetune", epoch=4, epochs=10))
    tell(Note("a → b − c"))
    {pause}
"""


def run_on_terminal(code: str, columns: int, **environment: str) -> tuple[str, str]:
    """Run Python code on a terminal. Returns all that it wrote, and the screen that it left."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, env=kept | {"TERM": "xterm"} | environment
    )
    os.close(side)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    assert process.wait(60) == 0, written.decode(errors="replace")
    screen = pyte.Screen(columns, 40)
    stream = pyte.ByteStream(screen)
    stream.feed(written)
    return written.decode("latin-1"), "\n".join(line.rstrip() for line in screen.display).strip()


def scene(pause: str = "") -> str:
    return SCENE.format(tests=str(Path(__file__).parent), pause=pause)


DECODING = """
import sys, time
sys.path.insert(0, {tests!r})
from dpm_cli.cli.progress import follow
from dpm_cli.events import Done, FilesDecoded, PhaseBegan
with follow(quiet=False, as_json=False) as tell:
    tell(PhaseBegan("load", "loading the images"))
    tell(FilesDecoded("training", 45, 100))
    time.sleep(0.3)
    tell(Done())
"""


def test_decoding_shows_how_far_it_is_and_leaves_no_bar() -> None:
    written, screen = run_on_terminal(DECODING.format(tests=str(Path(__file__).parent)), 80)
    assert re.search(r"load .* 45% .*decoding training images", written)
    assert "load" not in screen


READINGS = ["epoch 4/10", "loss 0.412", "validation 91.2 %", "512 images/s", "waiting for data 3 %"]


@pytest.mark.parametrize(("columns", "shown"), [(60, 2), (80, 3), (100, 4), (140, 5)])
@pytest.mark.every(3)
def test_bar_percentage_and_time_stand_at_every_width(columns: int, shown: int) -> None:
    _, screen = run_on_terminal(scene(), columns)
    (line,) = (line for line in screen.splitlines() if line.startswith("finetune"))
    assert re.match(r"finetune  [━╸╺ ]{14,20}  ?45% +-?[-:0-9]+", line), line
    assert [reading for reading in READINGS if reading in line] == READINGS[:shown]
    assert len(line) <= columns


@pytest.mark.thorough
def test_without_colours_none_is_written() -> None:
    plain, _ = run_on_terminal(scene(), 80, NO_COLOR="1")
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert not colours.search(plain)
    assert colours.search(run_on_terminal(scene(), 80)[0])


def test_a_dumb_terminal_gets_lines() -> None:
    written, _ = run_on_terminal(scene(), 80, TERM="dumb")
    assert "\x1b" not in written
    assert "finetune 4/10  loss 0.412" in written
    assert "elapsed" in written


WIDE = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from dpm_cli.cli.app import main
from dpm_cli.cli.summaries import print_benchmarked, print_evaluated
from dpm_cli.results import Benchmarked
from dpm_cli.cli.tables import print_report
from made_up_report import make_report
from test_commands import EVALUATED
print_report(make_report(arch="a_net_of_mine"))
print_evaluated(replace(EVALUATED, latency={{"onnxruntime": replace(EVALUATED.latency["onnxruntime"], threads=2)}}))
main(["recipes"])
row = Benchmarked("somewhere/dout/model.onnx", "onnx", 10, "onnxruntime", 128, 16, 123.45, doubt="it waited")
print_benchmarked([replace(row, images_per_second=12345, faster=1.23)])
"""


def test_no_line_is_wider_than_a_terminal() -> None:
    written, _ = run_on_terminal(WIDE.format(tests=str(Path(__file__).parent)), 80)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", written.encode("latin-1").decode()).splitlines()
    assert max(map(len, lines)) <= 80
    assert "a_net_of_mine, depgraph + DPM, target macs 0.47: 46.9 % left (59.0 M of at most" in lines
    assert "model.onnx" in [line.split()[0] for line in lines if line.strip()]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_signs_that_an_encoding_lacks_become_ascii(encoding: str) -> None:
    written, screen = run_on_terminal(scene(), 80, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert "?" not in written.replace("\x1b[?25l", "").replace("\x1b[?25h", "")
    assert "note: a -> b - c" in screen


@pytest.mark.parametrize(
    ("width", "line"), [(3, ""), (4, "ab c"), (9, "ab c"), (10, "ab c  defg"), (99, "ab c  defg  h")]
)
def test_readings_that_do_not_fit_are_dropped_from_the_end(width: int, line: str) -> None:
    assert fit(["ab c", "defg", "h"], width) == line
