"""List image files and labels from a table: CSV with a path and a label per line, or JSON lines."""

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dpm_cli.data.listing import Entry, Listing
from dpm_cli.errors import DataError, flatten, listing

PATHS, LABELS, SPLITS = ("path", "file", "filename", "file_name", "image"), ("label", "class", "target"), ("split",)
TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation")  # splits that are tested on; the first that there is
LINES = (".jsonl", ".ndjson", ".json")  # endings of JSON lines; all others are CSV
EXPECTED = 'one image per line: path,label as CSV, or {"path": …, "label": …} as JSON lines (.jsonl)'
MOST_BYTES = 1 << 30
MOST_OF_A_LINE = 1 << 20  # characters
MOST_MISSING = 1000  # files that are not there, before the rest of a table is left unread
MOST_DIGITS = 18  # of a label that counts as a number


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a path relative to the table's folder or absolute, a label, and a split if it names one."""

    path: str
    label: str
    split: str


def list_table(root: Path, classes: int | None, *, labels: bool) -> tuple[Listing, Listing | None, tuple[str, ...]]:
    """Return training images, test images or None, and class names of a table, or of train.csv and test.csv in `root`.

    A column `split` may say which lines are for testing. labels: without them a path alone is enough. Raises DataError
    that names the table, the line or the first missing files.
    """
    tables = _find_tables(root)
    folder = root if root.is_dir() else root.parent
    rows: list[tuple[Row, int, int]] = []  # with size and time, as for `Entry`
    missing: list[str] = []
    for split, table in tables.items():
        for row in _read_rows(table, labels=labels):
            try:
                status = os.stat(os.path.join(folder, row.path))
            except (OSError, ValueError):
                missing.append(row.path)
                if len(missing) > MOST_MISSING:
                    break
            else:
                row = row if len(tables) == 1 else Row(row.path, row.label, split)
                rows.append((row, status.st_size, status.st_mtime_ns))
    if missing:
        raise DataError(_tell_missing(root, folder, missing))
    if not rows:
        raise DataError(f"{root} lists no images; expected {EXPECTED}")
    names = _sort_names({row.label for row, *_ in rows}) if labels else ()
    if labels and classes is not None and len(names) != classes:
        shown = listing(map(flatten, names), shown=5)
        raise DataError(
            f"{root} has {len(names)} classes ({shown}) but model.classes is {classes}; set it to {len(names)}"
        )
    number = {name: index for index, name in enumerate(names)}
    test_split = next((split for split in TEST if any(row.split == split for row, *_ in rows)), None)
    entries: dict[bool, list[Entry]] = {False: [], True: []}
    for row, size, modified in rows:
        is_test = row.split in TEST and row.split == test_split
        entries[is_test].append(Entry(row.path, number.get(row.label, 0), size, modified))
    test = Listing(folder, tuple(entries[True])) if test_split and labels else None
    return Listing(folder, tuple(entries[False])), test, names


def _tell_missing(root: Path, folder: Path, missing: Sequence[str]) -> str:
    count = str(len(missing)) if len(missing) <= MOST_MISSING else f"more than {MOST_MISSING}"
    shown = listing(map(flatten, missing))
    return f"{root} names {count} files that are not there: {shown}; paths are relative to {folder}"


def _find_tables(root: Path) -> dict[str, Path]:
    """Return the table by split. Raises DataError if there is none."""
    if root.is_file():
        return {"train": root}
    if root.is_dir():
        by_stem = {path.stem: path for path in sorted(root.iterdir()) if path.suffix in (".csv", ".tsv", *LINES)}
        found = {split: by_stem[split] for split in ("train", *TEST) if split in by_stem}
        if "train" in found:
            test = next((split for split in TEST if split in found), None)
            return {split: found[split] for split in ("train", test) if split}
        raise DataError(f"data.root {root} has no train.csv or train.jsonl; name the table itself as data.root")
    raise DataError(f"data.root {root} is not there; expected {EXPECTED}")


def _read_rows(table: Path, *, labels: bool) -> Iterator[Row]:
    """Read the lines of one table. Raises DataError that names the first line which cannot be used."""
    try:
        if table.stat().st_size > MOST_BYTES:
            raise DataError(f"{table} is larger than {MOST_BYTES} bytes: not a list of images")
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = _read_lines(table, file)
            cells = _read_json(table, lines) if table.suffix in LINES else _read_csv(table, lines)
            for number, values in cells:
                path, label, split = (_pick(values, names) for names in (PATHS, LABELS, SPLITS))
                if not path or (labels and not label):
                    what = "path" if not path else "label"
                    raise DataError(f"{table} line {number} has no {what}; expected {EXPECTED}")
                if split.lower() not in ("", *TRAIN, *TEST):
                    raise DataError(
                        f"{table} line {number} has the split {flatten(split)!r}; known: train, {', '.join(TEST)}"
                    )
                yield Row(path, label, split.lower())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read as UTF-8 text: {error}") from None


def _read_lines(table: Path, file: TextIO) -> Iterator[str]:
    """Yield the lines, but none that would fill the memory. Raises DataError that names one which is too long."""
    for number in itertools.count(1):
        line = file.readline(MOST_OF_A_LINE + 1)
        if len(line) > MOST_OF_A_LINE:
            raise DataError(f"{table} line {number} has more than {MOST_OF_A_LINE} characters; expected {EXPECTED}")
        if not line:
            return
        yield line


def _read_json(table: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise DataError(f"{table} line {number} is not a JSON object; expected {EXPECTED}")
        yield number, values


def _read_csv(table: Path, file: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Read CSV with or without a header; without one the columns are path, label and maybe split."""
    reader = csv.reader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
    columns: Sequence[str] = (PATHS[0], LABELS[0], SPLITS[0])
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if reader.line_num == 1 and cells and cells[0].lower() in (*PATHS, *LABELS):
                columns = [cell.lower() for cell in cells]
            elif any(cells):
                yield reader.line_num, dict(zip(columns, cells))
    except csv.Error as error:
        raise DataError(f"{table} line {reader.line_num} is no CSV ({error}); expected {EXPECTED}") from None


def _pick(values: Mapping[str, object], names: Sequence[str]) -> str:
    """Return the value of the first of these columns that there is, as text; none if it is a list or a mapping."""
    for name in names:
        if (value := values.get(name)) is not None:
            return str(value) if isinstance(value, (str, int, float)) else ""
    return ""


def _sort_names(names: set[str]) -> tuple[str, ...]:
    """Sort class names: as numbers if all are, so that label 10 comes after 9."""
    are_numbers = all(name.isdecimal() and len(name) <= MOST_DIGITS for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))  # 1 and 01 are two names
