"""Reading what a run folder holds: a file is read, is not there, or is told to be broken."""

import csv
import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

Row = Mapping[str, str]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time


class Unreadable(ValueError):
    """A file of a run folder that is not what its name says."""


def read_yaml(path: Path) -> Any:
    """Returns the content of a YAML file; None if there is none.

    Raises:
        Unreadable: it is no YAML.
    """
    try:
        return yaml.load(path.read_bytes(), LOADER)
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} is no YAML") from error
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from error


def read_columns(path: Path, required: Iterable[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a CSV file; both empty if there is none.

    Raises:
        Unreadable: it is no CSV, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except FileNotFoundError:
        return [], []
    except (csv.Error, UnicodeDecodeError) as error:
        raise Unreadable(f"{path.name} is no CSV") from error
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from error
    if "\0" in "".join(header) or any(len(row) > len(header) for row in rows):
        raise Unreadable(f"{path.name} is no CSV")
    missing = [name for name in required if name not in header]
    if missing and (header or rows):
        raise Unreadable(f"{path.name} has no column {missing[0]}")
    return header, [row for row in rows if row]


def read_rows(path: Path, required: Iterable[str] = ()) -> list[Row]:
    """Returns the rows of a CSV file as mappings; see `read_columns`."""
    header, rows = read_columns(path, required)
    return [dict(zip_longest(header, row, fillvalue="")) for row in rows]


def number(text: Any) -> float | None:
    """Returns a finite number, or None for anything else."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def part(tree: Any, *keys: str) -> Any:
    """Returns what stands under nested keys, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def text(value: Any) -> str:
    """Returns what can be written: names of files may hold bytes that are no characters."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()
