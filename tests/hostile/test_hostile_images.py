"""Lists of images and pictures of strangers: read or refused in one line, within the bounds of a refusal."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from attack import bounded
from PIL import Image

from dpm_cli.data import load_data
from dpm_cli.data.look import look_at
from dpm_cli.data.pictures import open_image
from dpm_cli.errors import DataError
from dpm_cli.recipe.sections import Data

MILLION = 1_000_000
TABLES: dict[str, Callable[[], bytes]] = {
    "a line without end.csv": lambda: b"a" * 20 * MILLION,
    "a line without end.jsonl": lambda: b'{"path": "' + b"a" * 20 * MILLION + b'"}',
    "a million missing files.csv": lambda: b"x,1\n" * MILLION,
    "a million missing files.jsonl": lambda: b'{"path":"x","label":1}\n' * MILLION,
    "a million columns.csv": lambda: b"," * MILLION,
    "ten million columns.csv": lambda: b"," * 10 * MILLION,
    "a record without end.csv": lambda: b'"\n",' * MILLION,
    "a field without end.csv": lambda: b'"' + b"a\n" * MILLION,
    "a number of 5000 digits.csv": lambda: b"0.png," + b"9" * 5000 + b"\n1.png,2\n",
    "numbers that are equal.csv": lambda: b"0.png,1\n1.png,01\n2.png,1\n",
    "a split of escapes.csv": lambda: b"0.png,1,\x1b[2J\n",
    "a split without end.csv": lambda: b"0.png,1," + b"a" * 100_000,
    "classes without end.csv": lambda: b"".join(b"0.png,%d\n" % number for number in range(20_000)),
    "long names of missing files.csv": lambda: b"".join(b"%d" % number * 9000 + b",1\n" for number in range(9)),
    "a name with a NUL.csv": lambda: b"0.png\0,1\n1.png,2\n",
    "a folder, a device and the table.csv": lambda: b".,1\n/dev/zero,1\n0.png,2\ntable.csv,2\n",
    "lists in lists.jsonl": lambda: b"[" * 500_000,
    "objects in objects.jsonl": lambda: b'{"path":' * 100_000,
    "a path of lists.jsonl": lambda: b'{"path":' + b"[" * 900 + b"]" * 900 + b',"label":1}',
    "a million empty lists.jsonl": lambda: b'{"path":[' + b"[]," * 300_000 + b"1]}",
    "a number of 900 000 digits.jsonl": lambda: b'{"path":"0.png","label":' + b"9" * 900_000 + b"}",
    "numbers that are none.jsonl": lambda: b'{"path":"0.png","label":NaN}\n{"path":"1.png","label":1e999}',
    "half a surrogate.jsonl": lambda: b'{"path":"\\ud800","label":1}',
    "utf-16.csv": lambda: "0.png,1\n1.png,2".encode("utf-16"),
    "random bytes.csv": lambda: bytes(range(256)) * 50,
    "nothing but zeros.csv": lambda: bytes(100_000),
    "nothing but lines.csv": lambda: b"\n" * MILLION,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.every(3)
def test_table_is_read_or_refused_in_one_line(pictures: Path, name: str) -> None:
    root = (pictures / "table").with_suffix(Path(name).suffix)
    root.write_bytes(TABLES[name]())
    settings = Data(name="csv", root=root, validation=0, batch=1)
    said = ""
    with bounded(root.stat().st_size):
        try:
            load_data(settings, shape=(1, 8, 8), classes=2, seed=0)
        except DataError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 1500, said[:3000]
    assert said or name.startswith("numbers that are")


# ------------------------------------------------------------------------------------------------------------ pictures


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, colours: int = 2) -> bytes:
    """A PNG with such a header, and one row of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 + 3 * min(width, 1000))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def saved(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format)
    return buffer.getvalue()


def gif(width: int, height: int, frames: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return screen + frame * frames + b";"


def tiff(width: int, height: int, entries: int = 0) -> bytes:
    """Uncompressed RGB, of which nothing is there."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 8, 277: 3, 278: height, 279: 3}
    fields = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    fields += [struct.pack("<HHII", 40000 + number % 9, 4, 2**30, 8) for number in range(entries)]
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + b"".join(fields) + bytes(4)


def packed_tiff(block: int, *, tiled: bool) -> bytes:
    """A TIFF of block x block pixels that are packed as one strip, or 16 x 16 pixels in a tile of that size."""
    packer = zlib.compressobj()
    data = b"".join(packer.compress(bytes(3 * block)) for _ in range(block)) + packer.flush()
    side = 16 if tiled else block
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 2, 277: 3}
    tags |= {322: block, 323: block, 324: 0, 325: len(data)} if tiled else {273: 0, 278: block, 279: len(data)}
    start = 8 + 2 + 12 * len(tags) + 4
    fields = [struct.pack("<HHII", tag, 4, 1, start if tag in (273, 324) else n) for tag, n in sorted(tags.items())]
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + b"".join(fields) + bytes(4) + data


def flat(format: str, width: int, height: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format, **options)
    return buffer.getvalue()


def scan_per_colour(side: int) -> bytes:
    """A baseline JPEG whose decoder must keep all colours before it can give a pixel, as a progressive one."""
    return flat("JPEG", side, side, progressive=True, subsampling=0).replace(b"\xff\xc2", b"\xff\xc0", 1)


PICTURES: dict[str, Callable[[], bytes]] = {
    "pixels without end": lambda: png(2**31 - 1, 2**31 - 1),
    "more pixels than Pillow takes": lambda: png(20_000, 20_000),
    "many pixels in a small file": lambda: png(13_000, 13_000),
    "many pixels with a fourth channel": lambda: png(9_000, 9_000, colours=6),
    "many grey pixels": lambda: png(13_000, 13_000, colours=0),
    "a line of pixels": lambda: png(100_000_000, 1),
    "text that unpacks to far more": lambda: png(
        8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * MILLION), 1))
    ),
    "a profile that unpacks to far more": lambda: png(
        8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 * MILLION), 1))
    ),
    "a chunk without end": lambda: png(8, 8)[:33] + b"\x7f\xff\xff\xffIDAT",
    "a large GIF of many frames": lambda: gif(13_000, 13_000, 1000),
    "a large TIFF": lambda: tiff(13_000, 13_000),
    "a TIFF of many entries": lambda: tiff(8, 8, 20_000),
    "a large BMP": lambda: saved("BMP")[:18] + struct.pack("<ii", 13_000, 13_000) + saved("BMP")[26:],
    "a large PPM": lambda: b"P6 13000 13000 255\n" + bytes(100),
    "a PPM without end": lambda: b"P6 " + b"1" * 10 * MILLION,
    "a large JPEG": lambda: saved("JPEG").replace(struct.pack(">HH", 8, 8), struct.pack(">HH", 13_000, 13_000)),
    "a large WebP": lambda: saved("WEBP").replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 16_383, 10_000)),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "an icon": lambda: b"\0\0\1\0\1\0" + bytes(100),
    "random bytes": lambda: bytes(range(256)),
}

BUFFERED: dict[str, Callable[[], bytes]] = {  # whose decoders need much beside the pixels
    "a TIFF of one packed strip": lambda: packed_tiff(8_000, tiled=False),
    "a small TIFF in a huge tile": lambda: packed_tiff(10_500, tiled=True),
    "a progressive JPEG": lambda: flat("JPEG", 7_000, 7_000, progressive=True, subsampling=0),
    "a JPEG of a scan per colour": lambda: scan_per_colour(7_000),
    "a small WebP of many pixels": lambda: flat("WEBP", 5_000, 5_000, quality=1, method=0),
}


@pytest.mark.parametrize("name", BUFFERED)
@pytest.mark.thorough
def test_picture_that_needs_buffers_is_bounded_too(tmp_path: Path, name: str) -> None:
    test_picture_is_decoded_or_refused_in_one_line(tmp_path, name)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.every(3)
def test_picture_is_decoded_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes((PICTURES | BUFFERED)[name]())
    said = ""
    with bounded(path.stat().st_size):
        try:
            open_image(str(path), 3)
        except DataError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 1500


@pytest.mark.thorough
def test_picture_of_a_phone_is_read(tmp_path: Path) -> None:
    """108 million pixels in a few megabytes."""
    (tmp_path / "phone.jpg").write_bytes(flat("JPEG", 12_000, 9_000))
    with bounded(0):
        assert open_image(str(tmp_path / "phone.jpg"), 3).size == (6_000, 4_500)


def test_more_pixels_than_pillow_takes_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(20_000, 20_000))
    with pytest.raises(DataError, match=r"large\.png has more than [\d,]+ pixels: scale it down, or remove it"):
        open_image(str(tmp_path / "large.png"), 3)


def test_jpeg_of_more_pixels_than_pillow_takes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "large.jpg").write_bytes(flat("JPEG", 100, 80))
    assert open_image(str(tmp_path / "large.jpg"), 3).size == (100, 80)


def test_libtiff_does_not_print(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.tif").write_bytes(packed_tiff(64, tiled=True)[:-8])
    with pytest.raises(DataError, match="is not a readable image"):
        open_image(str(tmp_path / "damaged.tif"), 3)
    assert capfd.readouterr().err == ""


def test_file_of_another_kind_is_said_to_be_none_of_those_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(
        DataError, match=r"not a readable image .none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP, or damaged"
    ):
        open_image(str(tmp_path / "x.jpg"), 3)


def test_looking_at_a_folder_waits_for_no_pipe(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "1.png")
    os.mkfifo(tmp_path / "a" / "0.jpg")
    (tmp_path / "b" / "0.jpg").write_bytes(flat("EPS", 4, 4))  # which Pillow would take to another program
    assert look_at(str(tmp_path)).height == 9


def test_large_picture_in_a_small_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(13_000, 13_000))
    with pytest.raises(DataError, match=r"large\.png has 13000×13000 pixels, .* scale it down, or remove it"):
        open_image(str(tmp_path / "large.png"), 3)
