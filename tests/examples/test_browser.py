"""The page of examples/browser/ in headless Chromium. Needs `npm install` there, and Chromium."""

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpm_cli
from dpm_cli.models import build

PAGE = Path(__file__).parents[2] / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed"),
    pytest.mark.skipif(not (PAGE / "node_modules").exists(), reason="npm install was not run in examples/browser"),
]


# Chromium dumps a page once it is loaded: this picture loads when there is an answer.
WAIT = """<img src="hold"><script>
new MutationObserver(() => fetch("done")).observe(document.getElementById("answer"), {childList: true})
</script>"""


class _Server(SimpleHTTPRequestHandler):
    answered = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/hold":
            self.answered.wait(60)
        if self.path == "/done":
            self.answered.set()
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder with the page, and its address."""
    (tmp_path / "index.html").write_text((PAGE / "index.html").read_text(encoding="utf-8") + WAIT, encoding="utf-8")
    (tmp_path / "node_modules").symlink_to((PAGE / "node_modules").resolve())
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Server, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_browser_answers_as_python_does(site: tuple[Path, str]) -> None:
    folder, address = site
    torch.manual_seed(0)
    net = build("digits", classes=10, shape=(1, 8, 8)).eval()
    dpm_cli.save(net, folder / "slim.pt", arch="digits", shape=(1, 8, 8), mean=[0.3], std=[0.2])
    dpm_cli.export_slim(folder / "slim.pt", formats=["onnx"], output=folder)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    assert CHROMIUM is not None
    page = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--timeout=90000",
            f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"{address}/?image=picture.png",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    (text,) = re.findall(r'<pre id="answer">(.*?)</pre>', page, re.DOTALL)
    answer = json.loads(html.unescape(text))  # anything else is the page's own error
    metadata = dpm_cli.read_metadata(folder / "model.onnx")
    with torch.no_grad():
        wanted = net(dpm_cli.prepare(folder / "picture.png", metadata)[None])[0]
    torch.testing.assert_close(torch.tensor(answer["logits"]), wanted, rtol=1e-4, atol=1e-4)
