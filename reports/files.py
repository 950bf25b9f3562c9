"""Reading what a run folder holds: a file is read, is not there, or is told to be broken."""

import csv
import io
import os
import stat
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import yaml

from endless import is_endless

Row = Mapping[str, str]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time
MAX_NUMBER = 1e100
"""Beyond it, sums and squares may be none."""


class Unreadable(ValueError):
    """A file of a run folder that is not what its name says."""


def opened(path: Path) -> BinaryIO:
    """Opens a file; whoever reads a pipe or a device may read forever.

    Raises:
        OSError: there is none, or something else has its name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no file")
    return os.fdopen(descriptor, "rb")


def read_yaml(path: Path) -> Any:
    """Returns the content of a YAML file; None if there is none.

    Raises:
        Unreadable: it is no YAML, or says more than anybody has written.
    """
    try:
        with opened(path) as file:
            content = yaml.load(file.read(), LOADER)
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} is no YAML") from error
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from error
    if is_endless(content):
        raise Unreadable(f"{path.name} refers to itself, or says too much")
    return content


def last_line(path: Path) -> str:
    """Returns the last line of a text that is not empty; "" if there is none."""
    try:
        with opened(path) as file:
            file.seek(max(0, path.stat().st_size - 2**12))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


def read_columns(path: Path, required: Iterable[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a CSV file; both empty if there is none.

    Raises:
        Unreadable: it is no CSV, or lacks a column.
    """
    try:
        # Spreadsheets write a mark in front, which is no part of the first name.
        with io.TextIOWrapper(opened(path), "utf-8-sig", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except FileNotFoundError:
        return [], []
    except (csv.Error, UnicodeDecodeError) as error:
        raise Unreadable(f"{path.name} is no CSV") from error
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from error
    if "\0" in "".join(header) or any(len(row) > len(header) for row in rows):
        raise Unreadable(f"{path.name} is no CSV")
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise Unreadable(f"{path.name} has the column {twice[0]} twice")
    missing = [name for name in required if name not in header]
    if missing and (header or rows):
        raise Unreadable(f"{path.name} has no column {missing[0]}")
    return header, [row for row in rows if row]


def read_rows(path: Path, required: Iterable[str] = ()) -> list[Row]:
    """Returns the rows of a CSV file as mappings; see `read_columns`."""
    header, rows = read_columns(path, required)
    return [dict(zip_longest(header, row, fillvalue="")) for row in rows]


def number(text: Any) -> float | None:
    """Returns a number that can be reckoned with, or None for anything else."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < MAX_NUMBER else None  # false for what is no number, too


def part(tree: Any, *keys: str) -> Any:
    """Returns what stands under nested keys, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def text(value: Any) -> str:
    """Returns what can be written: names of files may hold bytes that are no characters."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def is_archive(path: Path) -> bool:
    """Tells whether a checkpoint ends as an archive does.

    Its table of contents stands at the end, so that a file which was cut off has none. Its tensors
    are not read: that would take a second per gigabyte.
    """
    try:
        with opened(path) as file, ZipFile(file) as archive:
            return bool(archive.infolist())
    except (BadZipFile, OSError, ValueError, NotImplementedError):
        return False
