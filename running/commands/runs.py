"""Lists the runs in a folder: their state, how far they are, and the best that they reached.

    python main.py runs
    python main.py runs runs/slimmable --json

A run is running (a process trains there), finished, resumable (the same command goes on with it),
empty (nothing was saved yet), or broken, and then the table says why.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reports import BROKEN, RunRecord, age, find_runs, progress, read_run

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    parser.add_argument("--json", action="store_true", help="Prints a JSON list, and nothing else.")


def run(arguments: argparse.Namespace) -> None:
    records = [read_run(folder) for folder in find_runs([arguments.folder])]
    if arguments.json:
        print(json.dumps([as_dict(record) for record in records], indent=2, allow_nan=False))
    else:
        show(records, arguments.folder)


def as_dict(record: RunRecord) -> dict[str, Any]:
    """Returns what `--json` prints of a run."""
    return {
        "name": os.fspath(record.path).encode("utf-8", "replace").decode(),
        "experiment": record.experiment,
        "data": record.data,
        "seed": record.seed,
        "state": record.state,
        "why": record.why,
        "epoch": record.history.epoch,
        "max_epochs": record.max_epochs,
        "metric": record.history.monitor,
        "best": record.history.best,
        "age_seconds": round(record.age, 1),
        "device": record.device,
        "commit": record.commit,
        "started": record.started,
        "test_acc": {point.name: point.test_acc for point in record.points},
    }


def show(records: Sequence[RunRecord], folder: Path) -> None:
    """Prints a table."""
    table = Table(title=f"{len(records)} runs in {escape(str(folder))}", row_styles=["", "dim"])
    table.add_column("name", overflow="fold", ratio=3)
    table.add_column("state", overflow="fold", ratio=2)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("best", justify="right", overflow="fold")
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("device", overflow="fold", ratio=1)
    for record in records:
        inside = record.path.relative_to(folder)
        name = str(inside) if inside.parts else record.path.name
        state = f"{record.state}: {record.why}" if record.why else record.state
        history = record.history
        cells = (
            CONTROL.sub("?", name.encode("utf-8", "replace").decode()),
            state,
            progress(record),
            "" if history.best is None else f"{history.best:.4g}",
            age(record.age),
            record.device,
        )
        table.add_row(*map(escape, cells), style="red" if record.state == BROKEN else None)
    Console().print(table)
