"""What experiments cost before anybody trains them: no data is read.

Of every operating point and every stage, for one image: multiply-accumulates; parameters; MiB of
activations that a training pass keeps for backward, and that live at once in inference; and the
measured milliseconds, for an image alone and for one of a batch. Weights and images are random,
which changes none of these. A stage is what lies between two exits, or a top-level part of a
network without. Times of points and of stages are measured in runs of their own.
"""

import argparse
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from networks import TIMED_BATCH_SIZE
from reports import in_units, profile_figure
from running.profile import Costs, check_experiment, profile_experiment

FILES = "profile.csv", "profile.png"
MAX_BATCH_SIZE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        type=Path,
        required=True,
        help="YAML of an experiment; several are measured one after the other",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what computes (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=TIMED_BATCH_SIZE,
        help="images in the larger of the two batches that are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for profile.csv and profile.png; without it nothing is written",
    )


def run(arguments: argparse.Namespace) -> None:
    paths, batch_size = arguments.config, arguments.batch_size
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"--batch_size is {batch_size}: give 1 to {MAX_BATCH_SIZE}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and torch finds no GPU: use --device cpu")
    for path in paths:
        check_experiment(path)
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: name each experiment once")
    made = [] if arguments.out is None else check_out(arguments.out)
    try:
        measure(paths, torch.device(arguments.device), batch_size, arguments.out)
    finally:
        for folder in made:  # of a profile that did not end well, nothing is left
            if not any(folder.iterdir()):
                folder.rmdir()


def measure(paths: Sequence[Path], device: torch.device, batch_size: int, out: Path | None) -> None:
    """Measures experiments, prints a table of each, and writes them if a folder is given."""
    console = Console()
    profiles = {}
    for path in paths:
        with console.status(f"measuring {path}"):
            profiles[str(path)] = profile_experiment(path, device, batch_size)
        console.print(table_of(str(path), profiles[str(path)], batch_size))
    console.print(f"per image, in float32; ms on {describe(device)}")
    if out is not None:
        write(out, profiles, batch_size, describe(device))
        console.print(f"written: {', '.join(str(out / name) for name in FILES)}")


def check_out(folder: Path) -> list[Path]:
    """Makes the folder, and returns it and those above it that were not there.

    Raises:
        ValueError: it cannot be written to, or holds a profile.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    there = [folder / name for name in FILES if (folder / name).exists()]
    if there:
        raise ValueError(f"{there[0]} exists: remove it, or give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{FILES[0]}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out {folder} cannot be written to ({error.strerror}): give another"
        ) from error
    return made


def describe(device: torch.device) -> str:
    """Returns what computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)"


def table_of(title: str, costs: Sequence[Costs], batch_size: int) -> Table:
    """Returns the table of an experiment; the columns of several are below each other."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", width=20, overflow="fold")
    for name in ("MACs", "params", "kept MiB", "peak MiB", "ms, 1", f"ms, {batch_size}"):
        table.add_column(name, justify="right", width=8)
    for before, row in zip([None, *costs], costs, strict=False):
        if before is None or before.kind != row.kind:
            table.add_section()
            table.add_row(f"{row.kind}s", style="bold")
        table.add_row(
            f"  {row.name}",
            *map(in_units, (row.macs, row.params)),
            in_digits(row.kept_bytes and row.kept_bytes / 2**20),
            *map(in_digits, (row.peak_bytes / 2**20, row.ms_alone, row.ms_in_batch)),
        )
    return table


def in_digits(number: float | None) -> str:
    """Returns three digits of a number, or all before the point."""
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def write(
    folder: Path, profiles: Mapping[str, Sequence[Costs]], batch_size: int, device: str
) -> None:
    """Writes table and picture, both whole or none."""
    rows = [
        {"experiment": experiment, **row._asdict(), "batch_size": batch_size, "device": device}
        for experiment, costs in profiles.items()
        for row in costs
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    picture = io.BytesIO()
    profile_figure(rows).save(picture, format="png", scale_factor=2)
    parts = [folder / f"{name}.part" for name in FILES]
    try:
        for part, content in zip(
            parts, (text.getvalue().encode(), picture.getvalue()), strict=True
        ):
            part.write_bytes(content)
        for part in parts:
            os.replace(part, part.with_suffix(""))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
