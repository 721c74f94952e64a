"""Open one picture of anybody: formats that Pillow decodes itself, in no more memory than the file gives reason for."""

import contextlib
import io
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from dpm_cli.errors import DataError, flatten
from dpm_cli.files import open_regular

MODES = {1: "L", 3: "RGB"}
# What Pillow decodes itself; for others, such as EPS, it would start another program on a stranger's file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BYTES = {"1": 1, "L": 1, "P": 1}  # of a pixel in memory; 4 of any other mode
JPEG_START = b"\xff\xd8"
JPEG_FACTORS = (1, 2, 4, 8)  # by which both sides of a JPEG can be divided while it is decoded
ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH, SAMPLES, BITS = 278, 322, 323, 277, 258  # tags of TIFF
TIMES, MORE = 4, 280 << 20  # memory to decode a file: times its size, plus bytes


class _TooLarge(Exception):
    """The pixels would take much more memory than the size of the file tells."""


@contextlib.contextmanager
def open_header(source: str | bytes) -> Iterator[tuple[Image.Image, int]]:
    """Yield an image of which only the header has been read, and the number of bytes of its file.

    source: a path, or what a file holds. Raises OSError for what is no regular file, nearly anything for damaged ones.
    """
    with (
        warnings.catch_warnings(action="ignore"),  # about EXIF data, palettes and many pixels
        open_regular(source) if isinstance(source, str) else io.BytesIO(source) as file,
        _open(file) as image,
    ):
        yield image, os.fstat(file.fileno()).st_size if isinstance(source, str) else len(source)


def _open(file: BinaryIO) -> Image.Image:
    """Read the header. Pillow's own bound on pixels does not hold for JPEG, which `_fit_memory_` scales down."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"none of {', '.join(FORMATS)}, or damaged") from None
    except Image.DecompressionBombError as error:
        file.seek(0)
        if file.read(len(JPEG_START)) != JPEG_START:
            raise _TooLarge(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
        file.seek(0)
        return JpegImageFile(file)


def open_image(source: str | bytes, channels: int, *, name: str | None = None) -> Image.Image:
    """Decode a file, or what it holds, completely. Raises DataError naming the file. name: of what has no path.

    A JPEG whose pixels would take too much memory, such as a phone's of 108 million, comes at half its sides or less.
    """
    wanted, name = MODES[channels], name or str(source)
    try:
        with open_header(source) as (image, size):
            mode = image.mode
            _fit_memory_(image, wanted, size)
            with _silent_libtiff(image):
                image.load()
            decoded = image if mode == wanted else image.convert(wanted)  # which would copy it
    except _TooLarge as error:
        raise DataError(f"{name} {error}: scale it down, or remove it") from None
    except Exception as error:  # damaged files make PIL raise nearly anything, SyntaxError included
        raise DataError(f"{name} is not a readable image ({flatten(error)}); repair or remove it") from None
    if mode[0] in "IF":  # PIL clips these to white without a word
        raise DataError(f"{name} has more than 8 bits per pixel (mode {mode}); convert it to 8 bits")
    return decoded


def _fit_memory_(image: Image.Image, mode: str, size: int) -> None:
    """Let a JPEG of very many pixels in a small file be decoded at half its sides, or less. size: bytes of the file.

    Raises _TooLarge for other such pictures, and where that is not enough.
    """
    each = BYTES.get(image.mode, 4) * (4 if image.format == "WEBP" else 1)  # two frames, a canvas and a copy
    each += BYTES.get(mode, 4) if image.mode != mode else 0
    pixels, most, more = image.width * image.height, TIMES * size + MORE, _count_buffers(image)
    for factor in JPEG_FACTORS if isinstance(image, JpegImageFile) else (1,):
        needed = pixels * each // factor**2 + more
        if needed <= most:
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            return
    raise _TooLarge(f"has {image.width}×{image.height} pixels, which take {needed >> 20} MB, in {size:,} bytes")


def _count_buffers(image: Image.Image) -> int:
    """Count the bytes that a decoder needs beside the pixels."""
    if isinstance(image, JpegImageFile):
        return 0 if _is_in_one_scan(image) else _count_coefficients(image)
    if isinstance(image, TiffImageFile) and _is_libtiffs(image):
        tags = image.tag_v2
        rows, width, tall = (_largest(tags.get(tag, image.height)) for tag in (ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH))
        block = width * tall if TILE_WIDTH in tags else image.width * min(rows, image.height)
        return block * _largest(tags.get(SAMPLES, 1)) * -(-_largest(tags.get(BITS, 1)) // 8)
    return 0


def _is_in_one_scan(image: JpegImageFile) -> bool:
    """Tell whether all colours are in the scan whose header Pillow has just read; else the decoder keeps each whole."""
    assert image.fp is not None
    colours, place = len(image.layer), image.fp.tell()
    header = b"\xff\xda" + struct.pack(">HB", 6 + 2 * colours, colours)
    image.fp.seek(max(0, place - 8 - 2 * colours))
    is_first = image.fp.read(len(header)) == header
    image.fp.seek(place)
    return is_first and "progressive" not in image.info


def _count_coefficients(image: JpegImageFile) -> int:
    """Count the bytes of two-byte numbers, one for each pixel of each colour."""
    widest, tallest = (max(layer[axis] for layer in image.layer) for axis in (1, 2))
    each = sum(layer[1] * layer[2] for layer in image.layer) / (widest * tallest)
    return 2 * int(image.width * image.height * each)


def _is_libtiffs(image: TiffImageFile) -> bool:
    return bool(image.tile) and image.tile[0].codec_name == "libtiff"


def _largest(value: Any) -> int:
    """Return a number of a tag, which may hold several."""
    return int(max(value)) if isinstance(value, tuple) else int(value)


@contextlib.contextmanager
def _silent_libtiff(image: Image.Image) -> Iterator[None]:
    """Keep libtiff from printing: what it says of a damaged file, Pillow raises."""
    if not (isinstance(image, TiffImageFile) and _is_libtiffs(image)):
        yield
        return
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
