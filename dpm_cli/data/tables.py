"""List image files and labels from a table: CSV with a path and a label per line, or JSON lines."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpm_cli.data.listing import Entry, Listing
from dpm_cli.errors import DataError, listing

PATHS, LABELS, SPLITS = ("path", "file", "filename", "file_name", "image"), ("label", "class", "target"), ("split",)
TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation")  # splits that are tested on; the first that there is
LINES = (".jsonl", ".ndjson", ".json")  # endings of JSON lines; all others are CSV
EXPECTED = 'one image per line: path,label as CSV, or {"path": …, "label": …} as JSON lines (.jsonl)'
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
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
    rows = [
        (table, row if len(tables) == 1 else Row(row.path, row.label, split))
        for split, table in tables.items()
        for row in _read_rows(table, labels=labels)
    ]
    if not rows:
        raise DataError(f"{root} lists no images; expected {EXPECTED}")
    names = _sort_names({row.label for _, row in rows}) if labels else ()
    number = {name: index for index, name in enumerate(names)}
    folder = root if root.is_dir() else root.parent
    test_split = next((split for split in TEST if any(row.split == split for _, row in rows)), None)
    entries: dict[bool, list[Entry]] = {False: [], True: []}
    missing = []
    for _, row in rows:
        entry = _find_entry(folder, row, number.get(row.label, 0))
        if entry is None:
            missing.append(row.path)
        else:
            entries[row.split in TEST and row.split == test_split].append(entry)
    if missing:
        raise DataError(
            f"{root} names {len(missing)} files that are not there: {listing(missing)}; paths are relative to {folder}"
        )
    if labels and classes is not None and len(names) != classes:
        shown = listing(names, shown=5)
        raise DataError(
            f"{root} has {len(names)} classes ({shown}) but model.classes is {classes}; set it to {len(names)}"
        )
    test = Listing(folder, tuple(entries[True])) if test_split and labels else None
    return Listing(folder, tuple(entries[False])), test, names


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
            lines = _read_json(table, file) if table.suffix in LINES else _read_csv(table, file)
            for number, values in lines:
                path, label, split = (_pick(values, names) for names in (PATHS, LABELS, SPLITS))
                if not path or (labels and not label):
                    what = "path" if not path else "label"
                    raise DataError(f"{table} line {number} has no {what}; expected {EXPECTED}")
                if split.lower() not in ("", *TRAIN, *TEST):
                    raise DataError(f"{table} line {number} has the split {split!r}; known: train, {', '.join(TEST)}")
                yield Row(path, label, split.lower())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read as UTF-8 text: {error}") from None


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
    """Return the value of the first of these columns that there is, as text."""
    value = next((values[name] for name in names if values.get(name) is not None), "")
    return str(value)


def _sort_names(names: set[str]) -> tuple[str, ...]:
    """Sort class names: as numbers if all are, so that label 10 comes after 9."""
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def _find_entry(folder: Path, row: Row, label: int) -> Entry | None:
    try:
        status = os.stat(folder / row.path)
    except (OSError, ValueError):
        return None
    return Entry(row.path, label, status.st_size, status.st_mtime_ns)
