"""Writes an operating point of a run as a file that works without this project.

    python main.py export --run runs/slimmable/digits_us/seed0 --point w0.5
    python main.py export --run runs/msdnet/digits_msdnet/seed0 --point budget_exit2 --images photos

As ONNX it needs onnxruntime and numpy alone. A width is a narrow network, an exit a network that
ends there; a point that leaves early is one file that stops where an image leaves, for images one
at a time, and beside it a folder of stages with a runner, for batches. Images go in as bytes:
their normalisation is part of the file. Before anything is written it is compared with the
checkpoint on real images, and then timed beside PyTorch.
"""

import argparse
from pathlib import Path

from running.exporting import export_point
from running.exporting.files import SUFFIXES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--point", default="full", help="name of the operating point (full)")
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="onnx", help="(onnx)")
    parser.add_argument("--out", type=Path, help="the file (RUN/export/POINT.onnx or .pt2)")
    parser.add_argument(
        "--images", type=Path, help="folder of real images to compare on (the run's test data)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(arguments: argparse.Namespace) -> None:
    export_point(
        arguments.run,
        arguments.point,
        arguments.format,
        arguments.out,
        arguments.images,
        arguments.overwrite,
    )
