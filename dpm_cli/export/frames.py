"""Send plain numbers and JSON between two processes, so that neither can make the other execute anything."""

import json
import math
import select
import struct
import time
from collections.abc import Iterable, Mapping
from io import RawIOBase
from typing import IO, Any

import numpy as np

LENGTH = struct.Struct("<I")
MOST_JSON = 8 << 20  # bytes; the metadata of a file are part of it
MOST_NUMBERS = 1 << 29  # in one array
KINDS = frozenset("float16 float32 float64 int8 int16 int32 int64 uint8 bool".split())


class Broken(Exception):
    """The other process has gone, is too slow, or sends what is no frame."""


class TooMuch(Broken):
    """The other process sends more numbers than anybody asked for."""


def write_frame(stream: IO[bytes], values: Mapping[str, Any], arrays: Iterable["np.ndarray[Any, Any]"] = ()) -> None:
    """Write values, and after them arrays of numbers. Raises OSError if nobody reads, ValueError for other arrays."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if odd := next((array.dtype.name for array in arrays if array.dtype.name not in KINDS), None):
        raise ValueError(f"an output holds {odd}, not numbers")
    described = [[array.dtype.name, list(array.shape)] for array in arrays]
    header = json.dumps({**values, "arrays": described}).encode()
    stream.write(LENGTH.pack(len(header)) + header)
    for array in arrays:
        stream.write(array.tobytes())
    stream.flush()


def read_frame(
    stream: RawIOBase, deadline: float | None = None, *, most: float = math.inf
) -> tuple[dict[str, Any], list["np.ndarray[Any, Any]"]]:
    """Read what `write_frame` wrote. deadline: of `time.monotonic`. most: bytes of all arrays. Raises Broken."""
    (length,) = LENGTH.unpack(_read(stream, LENGTH.size, deadline))
    if length > MOST_JSON:
        raise Broken("the header is too long")
    try:
        values = json.loads(_read(stream, length, deadline))
        described = [(_parse_kind(kind), _parse_sizes(sizes)) for kind, sizes in values.pop("arrays")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Broken(f"no frame: {error}") from None
    if (needed := sum(kind.itemsize * math.prod(sizes) for kind, sizes in described)) > most:
        raise TooMuch(f"{needed} bytes")
    return values, [_read_array(stream, kind, sizes, deadline) for kind, sizes in described]


def _parse_kind(kind: object) -> "np.dtype[Any]":
    if kind not in KINDS:
        raise ValueError(f"an array of {kind}")
    return np.dtype(str(kind))


def _parse_sizes(sizes: object) -> list[int]:
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"an array of shape {sizes}")
    if math.prod(sizes) > MOST_NUMBERS:
        raise ValueError("an array without end")
    return sizes


def _read_array(
    stream: RawIOBase, kind: "np.dtype[Any]", sizes: list[int], deadline: float | None
) -> "np.ndarray[Any, Any]":
    return np.frombuffer(_read(stream, math.prod(sizes) * kind.itemsize, deadline), kind).reshape(sizes)


def _read(stream: RawIOBase, size: int, deadline: float | None) -> bytearray:
    """Read so many bytes from an unbuffered stream."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                raise Broken("no answer in time")
        got = stream.readinto(view[done:])
        if not got:
            raise Broken("the other process has gone")
        done += got
    return data
