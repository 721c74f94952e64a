"""Find the dataset that a recipe names, before anything is held out, resized or decoded."""

import math
from dataclasses import dataclass
from functools import partial

import torch

from dpm_cli.data import digits
from dpm_cli.data.arrays import Arrays, check_classes
from dpm_cli.data.collect import collect, find_parts
from dpm_cli.data.downloads import KNOWN, read_known
from dpm_cli.data.hub import PREFIX, Rows, read_hub
from dpm_cli.data.listing import Listing, choose_tests, hold_out_test, list_folder, list_unlabelled
from dpm_cli.data.tables import list_table
from dpm_cli.layers.images import Framing
from dpm_cli.recipe.code import call_own_code
from dpm_cli.recipe.sections import Data

Part = Arrays | Listing | Rows


@dataclass(frozen=True)
class Source:
    """Holds a dataset as it was found."""

    train: Part
    test: Part
    names: tuple[str, ...]  # of the classes, by label
    test_held_out: bool = False


def find_source(data: Data, framing: Framing, classes: int) -> Source:
    """Find the dataset. Raises DataError if it is absent or does not have these classes."""
    match data.name:
        case "folder" | "csv":
            return _find_files(data, classes)
        case "digits":
            train, test = digits.read_digits()
            return _check(data.name, train, test, tuple("0123456789"), classes)
        case name if name in KNOWN:
            return _check(name, *read_known(name, data.root.expanduser(), download=data.download), classes)
        case name if name.startswith(PREFIX):
            root = data.root.expanduser()
            rows, tests, names = read_hub(name, root, download=data.download, labels=data.labels)
            return _hold_out(data, name, rows, tests, names, classes)
        case name:
            return _call(data, framing, classes)


def _find_files(data: Data, classes: int) -> Source:
    """List image files in class folders, or in a table."""
    root = data.root.expanduser()
    if data.name == "csv":
        files, tests, names = list_table(root, classes, labels=data.labels)
    elif data.labels:
        files, tests, names = list_folder(root, classes)
    else:
        files, tests, names = list_unlabelled(root), None, ()
    if not data.labels:
        return Source(files, files.select(torch.arange(0)), ())
    return Source(*hold_out_test(files), names, test_held_out=True) if tests is None else Source(files, tests, names)


def _call(data: Data, framing: Framing, classes: int) -> Source:
    """Let the user's own function give the images."""
    what = f"data.name {data.name}"
    arguments = {"root": data.root.expanduser(), "num_classes": classes, "classes": classes}
    parts = find_parts(call_own_code("data.name", data.name, arguments), what)
    take = partial(collect, framing=framing, labels=data.labels, most=data.memory_limit // math.prod(framing.shape))
    train = take(parts.train, what=what)
    names = (parts.names or train.name_classes()) if data.labels else ()
    test = None if parts.test is None else take(parts.test, what=f"{what} (test)").number(names)
    return _hold_out(data, what, train.number(names), test, names, classes)


def _hold_out(data: Data, what: str, train: Part, test: Part | None, names: tuple[str, ...], classes: int) -> Source:
    """Check the labels, and hold out a tenth of each class for testing if there are no test images."""
    if not data.labels:
        return Source(train, train.select(torch.arange(0)), ())
    if test is not None:
        return _check(what, train, test, names, classes)
    checked = _check(what, train, train.select(torch.arange(0)), names, classes)
    numbers = range(len(train))
    is_held = choose_tests(
        checked.train.labels.tolist(), [b"%d" % i for i in numbers], [f"image {i} of {what}" for i in numbers]
    )
    kept, held = (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]
    return Source(train.select(kept), train.select(held), names, test_held_out=True)


def _check(what: str, train: Part, test: Part, names: tuple[str, ...], classes: int) -> Source:
    check_classes(f"{what} (training images)", train.labels, names, classes)
    check_classes(f"{what} (test images)", test.labels, names, classes)
    return Source(train, test, names)
