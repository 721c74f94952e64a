"""Files from strangers: recipes, models, slim files and checkpoints that are malformed or meant to harm.

Whatever they hold: no code of theirs runs, the answer is one line, and neither memory nor time runs out.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits_recipe import recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.engine.checkpoint import MAGIC
from dpm_cli.errors import DpmError, Interrupted, RecipeError
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build, load_slim
from dpm_cli.recipe import load_recipe

EXECUTED = "executed"
MOST_BYTES, MOST_SECONDS = 2 * 10**9, 30


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (EXECUTED,)


SETTINGS = recipe(decay={"rectify": True}, checkpoint={"every": 2})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt, slim.pt, checkpoint.pt and recipe.yaml as they should be."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
    torch.manual_seed(0)
    torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), folder / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
        patch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
        dpm_cli.prune(folder / "model.pt", SETTINGS, output=folder / "out")
    steps = iter(range(100))
    with pytest.raises(Interrupted):
        dpm_cli.prune(folder / "model.pt", SETTINGS, output=folder / "half", should_stop=lambda: next(steps) == 3)
    torch.set_flush_denormal(False)
    (folder / "out" / "slim.pt").rename(folder / "slim.pt")
    (folder / "half" / "checkpoint.pt").rename(folder / "checkpoint.pt")
    return folder


def peak_bytes() -> int:
    """Of this process's memory, since the last reset."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.fixture(autouse=True)
def _bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; afterwards nothing was executed, and memory and time were bounded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPM_DEBUG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where a bug would leave its traceback
    is_linux = Path("/proc/self/clear_refs").exists()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes() if is_linux else 0
    started = time.monotonic()
    yield
    assert time.monotonic() - started < MOST_SECONDS
    assert not is_linux or peak_bytes() - before < MOST_BYTES
    assert not (tmp_path / EXECUTED).exists()
    assert not list(tmp_path.glob("*.log"))


def assert_refused(capsys: pytest.CaptureFixture[str], *arguments: object, codes: tuple[int, ...] = (2,)) -> str:
    """One line and the right exit code, or one line for each mistake of a recipe."""
    capsys.readouterr()
    code = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert code in codes, err
    assert out == ""
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), err
    assert "internal error" not in err
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 1500
    return err


# ----------------------------------------------------------------------------------------------------------- recipes


def with_setting(**changes: Any) -> bytes:
    return yaml.safe_dump(recipe(**changes)).encode()


def laughs(levels: int) -> bytes:
    lines = ["l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


RECIPES = {
    "tag that calls a function": b"model: !!python/object/apply:os.mkdir [executed]",
    "tag that makes an object": b"model: !!python/object/new:os.mkdir [executed]",
    "tag that names a function": b"model: !!python/name:os.mkdir",
    "tag that imports a module": b"model: !!python/module:antigravity",
    "tag of an own handle": b"%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.mkdir [executed]",
    "tag that no one knows": b"model: !boom 1",
    "alias bomb": laughs(20),
    "anchor inside itself": b"model: &m {arch: *m}",
    "merge key": b"base: &b {arch: digits}\nmodel: {<<: *b}",
    "deep brackets": b"[" * 100_000,
    "deep braces": b"{a: " * 20_000,
    "deep lines": "\n".join(" " * i + "- " for i in range(1, 1300)).encode(),
    "latin-1": "model: {arch: caf\xe9}".encode("latin-1"),
    "utf-16": "model: {arch: digits}".encode("utf-16"),
    "utf-32": "model: {arch: digits}".encode("utf-32"),
    "random bytes": bytes(range(256)) * 10,
    "nothing but zeros": bytes(1000),
    "two documents": b"model: {arch: digits}\n---\nmodel: {arch: digits}",
    "key that is a list": b"? [a, b]\n: 1",
    "key that is a mapping": b"? {a: b}\n: 1",
    "number of 5000 digits": b"seed: " + b"9" * 5000,
    "sexagesimal number of 5000 digits": b"seed: 1" + b":59" * 5000,
    "date that is none": b"seed: 2020-99-99",
    "binary that is none": b"seed: !!binary '%%%'",
    "terminal escapes in a key": b'"\\e[2J\\e]0;owned\\a": 1',
    "line break in a key": b'"a\\nb": 1',
    "a megabyte of one key": b"a" * (1 << 20) + b": 1",
    "larger than a recipe": b"# " + b"a" * (2 << 20),
    "epochs without end": with_setting(train={"epochs": 10**30}),
    "rounds without end": with_setting(prune={"rounds": 10**12}, train={"epochs": 10**12}),
    "batch without end": with_setting(data={"batch": 10**30}),
    "classes without end": with_setting(model={"classes": 10**12}),
    "image without end": with_setting(model={"input": [8192, 8192, 8192]}),
    "image of no size": with_setting(model={"input": [1, 0, 8]}),
    "image of negative size": with_setting(model={"input": [1, -8, 8]}),
    "infinite learning rate": with_setting(train={"lr": float("inf")}),
    "learning rate that is no number": with_setting(train={"lr": float("nan")}),
    "huge learning rate": with_setting(train={"lr": 1e308}),
    "negative decay": with_setting(decay={"steps": -1}),
    "padding without end": with_setting(data={"augment": {"crop": 10**12}}),
    "seed without end": with_setting(seed=10**100),
    "target of nothing": with_setting(prune={"target": {"macs": 1e-300}}),
    "target without end": with_setting(prune={"target": {"macs": 1e300}}),
    "architecture outside": with_setting(model={"arch": "../../etc/passwd:root"}),
    "architecture with a NUL": with_setting(model={"arch": "a\0b"}),
    "architecture of escapes": with_setting(model={"arch": "\x1b[2J"}),
    "architecture of a megabyte": with_setting(model={"arch": "a" * 900_000}),
    "root with a NUL": with_setting(data={"name": "folder", "root": "a\0b"}),
    "a hundred thousand lists": b"a: [" + b"[]," * 300_000 + b"]",
    "target of 400 digits": b"model: {arch: digits, classes: 10, input: [1, 8, 8]}\ndata: {name: digits}\n"
    b"prune: {target: {macs: " + b"9" * 400 + b"}}",
    "time of 400 digits": with_setting(prune={"target": {"latency": "9" * 400 + "ms"}}),
    "pattern without end": with_setting(prune={"keep": ["*" * 5000 + "a"]}),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.every(2)
def test_hostile_recipe(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(RECIPES[name])
    assert_refused(capsys, "prune", originals / "model.pt", "-r", "recipe.yaml", "--quiet", codes=(2, 3))
    assert not (tmp_path / "out" / "slim.pt").exists()


SCRAPS = st.sampled_from(
    ["model", "prune:", " ", "\n", "  ", "- ", "? ", ": ", "{", "}", "[", "]", "&a", "*a", "!!python/name:os.mkdir",
     "!", "<<", "1e999", "0x", ".nan", "'", '"', "|", ">", "%", "---", "...", "\t", "\0", "\ufeff", "#", "@", "`", "~"]
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.binary(max_size=60), st.lists(SCRAPS, max_size=25).map(lambda parts: "".join(parts).encode())))
@pytest.mark.thorough
def test_random_bytes_are_no_recipe(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    assert not [problem for problem in refusal.value.problems if "\n" in problem]


# ------------------------------------------------------------------------------------------------------------ models


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


def deep_list(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor_header(**changes: Any) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


def renamed(content: bytes, prefix: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return zipped({prefix + name.partition("/")[2]: archive.read(name) for name in archive.namelist()})


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"state_dict": value}
    return value


MODELS: dict[str, Callable[[], bytes]] = {
    "pickle bomb": lambda: saved(Bomb()),
    "pickle bomb as a weight": lambda: saved({"conv1.weight": Bomb()}),
    "pickle bomb in the old format": lambda: saved({"a": Bomb()}, _use_new_zipfile_serialization=False),
    "pickle bomb without torch": lambda: pickled(Bomb()),
    "pickle that calls os.mkdir by name": lambda: zipped(
        {"m/data.pkl": b"cos\nmkdir\n(S'executed'\ntR.", "m/version": b"3"}
    ),
    "pickle that evaluates": lambda: zipped(
        {"m/data.pkl": b'c__builtin__\neval\n(S\'__import__("os").mkdir("executed")\'\ntR.', "m/version": b"3"}
    ),
    "zip bomb": lambda: zipped({"m/data.pkl": bytes(10**8), "m/version": b"3"}, zipfile.ZIP_DEFLATED),
    "zip bomb in a weight": lambda: zipped(
        {"m/data.pkl": pickled({}), "m/data/0": bytes(10**8), "m/version": b"3"}, zipfile.ZIP_BZIP2
    ),
    "names that climb": lambda: renamed(saved({"w": Bomb()}), "../../../"),
    "names from the root": lambda: renamed(saved({"w": Bomb()}), "/"),
    "names with drives": lambda: renamed(saved({"w": torch.zeros(2)}), "C:\\x/"),
    "truncated zip": lambda: saved({"w": torch.zeros(1000)})[:3000],
    "zip without its end": lambda: saved({"w": torch.zeros(1000)})[:-22],
    "lists in lists": lambda: zipped({"m/data.pkl": deep_list(100_000), "m/version": b"3"}),
    "lists in lists, old format": lambda: deep_list(100_000),
    "endless frame": lambda: zipped({"m/data.pkl": b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "m/version": b"3"}),
    "endless string": lambda: zipped({"m/data.pkl": b"\x80\x04\x8d" + b"\x7f" * 8 + b"a.", "m/version": b"3"}),
    "endless memo": lambda: zipped({"m/data.pkl": b"\x80\x02}r\xff\xff\xff\x7f.", "m/version": b"3"}),
    "tensor larger than its data": lambda: saved({"linear.bias": torch.zeros(1).expand(10**13)}),
    "state dicts in state dicts": lambda: saved(nested(100)),
    "weights by number": lambda: saved({i: torch.zeros(1) for i in range(1000)}),
    "a hundred thousand names": lambda: saved(dict.fromkeys(map(str, range(100_000)), 0)),
    "wrappers in wrappers": lambda: saved({"module." * 100_000 + "a": torch.zeros(1)}),
    "names that steer a terminal": lambda: saved({"\x1b[2J\n\r": torch.zeros(1)}),
    "complex weights": lambda: saved({"conv1.weight": torch.zeros(2, dtype=torch.complex64)}),
    "sparse weights": lambda: saved({"conv1.weight": torch.zeros(2).to_sparse()}),
    "weights without data": lambda: saved({"conv1.weight": torch.empty(10**12, device="meta")}),
    "header without end": lambda: safetensors(b"{}", length=2**63),
    "header of nothing": lambda: safetensors(b""),
    "header that is no JSON": lambda: safetensors(b"{" * 1000),
    "header in headers": lambda: safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "shape without end": lambda: safetensors(tensor_header(shape=[2**40, 2**40]), bytes(4)),
    "shape that overflows": lambda: safetensors(tensor_header(shape=[2**32, 2**32, 0]), bytes(4)),
    "offsets outside": lambda: safetensors(tensor_header(data_offsets=[0, 2**50]), bytes(4)),
    "offsets backwards": lambda: safetensors(tensor_header(data_offsets=[4, 0]), bytes(4)),
    "type that no one knows": lambda: safetensors(tensor_header(dtype="F7"), bytes(4)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.every(2)
def test_hostile_model(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"model{suffix}").write_bytes(MODELS[name]())
        assert_refused(capsys, "inspect", f"model{suffix}", "-r", originals / "recipe.yaml")


def test_pipe_and_endless_link_are_no_models(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.pt")  # reading it would wait for ever
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for name in ("pipe.pt", "loop.pt", "/dev/zero"):
        assert_refused(capsys, "inspect", name, "-r", originals / "recipe.yaml")


# -------------------------------------------------------------------------------------------------------- slim files

SLIMS: dict[str, dict[str, Any]] = {
    "bomb in the weights": {"state_dict": {"conv1.weight": Bomb()}},
    "bomb in the report": {"report": Bomb()},
    "bomb for an architecture": {"arch": Bomb()},
    "a million lists in the report": {"report": '{"a":[' + "[]," * 2_000_000 + "1]}"},
    "architecture that runs": {"arch": "os:getcwd"},
    "architecture outside": {"arch": "../../../etc/passwd"},
    "architecture from a hub": {"arch": "timm:hf-hub:evil/evil"},
    "layer that climbs": {"edits": {"..": {"out_channels": 1}}},
    "layer of Python's own": {"edits": {"__class__": {"__init__": 1}}},
    "attribute of Python's own": {"edits": {"conv1": {"__class__": 1}}},
    "attribute that switches": {"edits": {"conv1": {"training": 1}}},
    "endless channels": {"edits": {"conv1": {"out_channels": 2**62}}},
    "number beyond 64 bits": {"edits": {"conv1": {"out_channels": 2**100}}},
    "negative channels": {"edits": {"conv1": {"out_channels": -1}}},
    "endless image": {"shape": [8192, 8192, 8192]},
    "large image": {"shape": [1, 8192, 8192]},
    "endless classes": {"classes": 2**60},
    "weights of another shape": {"state_dict": {"conv1.weight": torch.zeros(1).expand(10**12)}},
    "report in reports": {"report": '{"a":' * 100_000},
    "number of 10000 digits in the report": {"report": '{"a": ' + "9" * 10_000 + "}"},
    "frozen names that are none": {"frozen": [["a"]]},
    "a million frozen names": {"frozen": [1] * 1_000_000},
    "another format": {"format": ["dpm-slim"]},
    "later version": {"version": 2**70},
}


@pytest.mark.parametrize("name", SLIMS)
@pytest.mark.every(2)
def test_hostile_slim_file(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    torch.save(torch.load(originals / "slim.pt", weights_only=True) | SLIMS[name], tmp_path / "slim.pt")
    assert_refused(capsys, "export", "slim.pt", "-o", "there")
    assert not list(tmp_path.glob("there/*"))


# ------------------------------------------------------------------------------------------------------- checkpoints


def sealed(data: bytes) -> bytes:
    """Under a right checksum."""
    return MAGIC + hashlib.sha256(data).digest() + data


def changed_at(path: str, value: object) -> Callable[[dict[str, Any]], bytes]:
    """A checkpoint in which one value is replaced, or removed by `...`."""

    def change(state: dict[str, Any]) -> bytes:
        *sections, key = path.split("/")
        place = state
        for section in sections:
            place = place[section]
        if value is ...:
            del place[key]
        else:
            place[key] = value(place[key]) if callable(value) else value
        return sealed(saved(state))

    return change


def raw(data: bytes) -> Callable[[dict[str, Any]], bytes]:
    return lambda state: data


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "random bytes": raw(bytes(range(256)) * 40),
    "empty": raw(b""),
    "bomb": raw(sealed(saved({"a": Bomb()}))),
    "bomb in the old format": raw(sealed(saved({"a": Bomb()}, _use_new_zipfile_serialization=False))),
    "zip bomb": raw(sealed(zipped({"m/data.pkl": bytes(10**8), "m/version": b"3"}, zipfile.ZIP_DEFLATED))),
    "lists in lists": raw(sealed(zipped({"m/data.pkl": deep_list(100_000), "m/version": b"3"}))),
    "a list": raw(sealed(saved([1, 2]))),
    "nothing": raw(sealed(saved({}))),
    "no data": changed_at("data", ...),
    "data of another kind": changed_at("data", 3),
    "recipe of escapes": changed_at("recipe", "\x1b[2J\n" * 1000),
    "recipe of a megabyte": changed_at("recipe", "a" * 10**6),
    "weights of another kind": changed_at("weights", ["a"]),
    "endless stage": changed_at("stage", 2**62),
    "negative stage": changed_at("stage", -1),
    "negative step": changed_at("step", -5),
    "step that is none": changed_at("step", "later"),
    "seconds that are none": changed_at("seconds", {"train": "long"}),
    "model of another kind": changed_at("parts/trainee/model", {"conv1.weight": 3}),
    "model without a weight": changed_at("parts/trainee/model/conv1.weight", ...),
    "endless weight": changed_at("parts/trainee/model/conv1.weight", torch.zeros(1).expand(10**12)),
    "survivors of another model": changed_at("parts/trainee/pruning/survivors", torch.ones(3, dtype=torch.bool)),
    "no survivors": changed_at("parts/trainee/pruning/survivors", torch.zeros_like),
    "survivors that are numbers": changed_at("parts/trainee/pruning/survivors", lambda old: old.long() * 7),
    "endless survivors": changed_at("parts/trainee/pruning/survivors", torch.ones(1, dtype=torch.bool).expand(10**12)),
    "decay of another model": changed_at("parts/trainee/pruning/decay/age", torch.zeros(1, dtype=torch.int64)),
    "decay that is none": changed_at("parts/trainee/pruning/decay/initial", "none"),
    "rectifier of another model": changed_at("parts/trainee/pruning/decay/rectifier/evidence", torch.zeros(1)),
    "round that is none": changed_at("parts/trainee/pruning/round", "first"),
    "optimizer of another model": changed_at("in_stage/optimizer", {"evil": {"momentum_buffer": torch.zeros(1)}}),
    "optimizer that is none": changed_at("in_stage/optimizer", 3),
    "meter that is none": changed_at("in_stage/meter", {}),
    "clock that is none": changed_at("in_stage/epoch_seconds", "long"),
    "wait that is none": changed_at("in_stage/waited_seconds", None),
    "dice that are none": changed_at("rng", {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}),
    "metrics that are none": changed_at("metrics_bytes", [1]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.every(6)
def test_hostile_checkpoint(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    state = torch.load(io.BytesIO((originals / "checkpoint.pt").read_bytes()[len(MAGIC) + 32 :]), weights_only=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(CHECKPOINTS[name](state))
    arguments = ("prune", originals / "model.pt", "-r", originals / "recipe.yaml", "--resume", "--quiet")
    assert_refused(capsys, *arguments, codes=(1, 2, 3))
    torch.set_flush_denormal(False)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint.pt"} <= left <= {"checkpoint.pt", "metrics.jsonl", "recipe.yaml"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.thorough
def test_damaged_slim_bytes_are_the_same_model_or_one_line(
    originals: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes of the records are changed under right checksums, as an attacker would."""
    with zipfile.ZipFile(originals / "slim.pt") as archive:
        entries = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    record = entries[data.draw(st.sampled_from(sorted(name for name in entries if entries[name])))]
    for _ in range(data.draw(st.integers(1, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "slim.pt").write_bytes(zipped({name: bytes(content) for name, content in entries.items()}))
    said = ""
    try:
        module = load_slim(tmp_path / "slim.pt").module
    except DpmError as error:
        said = str(error)
    assert "\n" not in said
    assert said or all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_there_are_enough_samples() -> None:
    assert len(RECIPES) + len(MODELS) + len(SLIMS) + len(CHECKPOINTS) >= 120
