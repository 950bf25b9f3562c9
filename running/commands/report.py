"""Writes a report over run folders: what they reached and what it costs, seeds taken together.

    python main.py report runs
    python main.py report runs/slimmable runs/msdnet/digits_msdnet/seed0 --out compared

The folder holds index.html (one file, which needs no network), report.md, points.csv and a PNG of
every figure. A run that is at work, unfinished or broken is a row that says so. Each data set has a
section of its own.
"""

import argparse
from pathlib import Path

from reports import states, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="A run folder, or what holds some.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        help="Folder of the report; an older report there is replaced (default: report).",
    )


def run(arguments: argparse.Namespace) -> None:
    index, records = write_report(arguments.runs, arguments.out)
    print(f"{len(records)} runs: {states(records)}\nreport: {index}")
