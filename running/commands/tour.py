"""Shows what this project does: six methods on scikit-learn's handwritten digits, in some minutes.

Each is trained by its own YAML, as `fit` would; then one page shows depth, width and exits in one
picture. Interrupted, the same command goes on where it was.
"""

import argparse
import os
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from reports import check_out, in_units, read_run
from running.background import start
from running.commands import report
from running.history import CSVHistory

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
POLLING = 0.2
"""Seconds between two looks at what the runs have written."""


class Stop(NamedTuple):
    """One method on the tour."""

    title: str
    what: str
    """What it shows, and why that matters."""
    yaml: str
    options: Sequence[str] = ()


STOPS = (
    Stop(
        "MSDNet",
        "exits: the easy images leave early, the whole network is there for the hard ones",
        "msdnet/digits_msdnet.yaml",
    ),
    Stop(
        "Universally Slimmable",
        "width: one set of weights runs at any share of its channels",
        "slimmable/digits_us.yaml",
        ("--trainer.callbacks+=callbacks.RecalibrationSweep",),
    ),
    Stop(
        "DenseNet",
        "reuse: every layer sees all layers before it, at memory linear in depth",
        "densenet/digits_densenet22.yaml",
    ),
    Stop(
        "Stochastic Depth",
        "depth: blocks are skipped at random in training, and skipped blocks cost nothing",
        "quickstart.yaml",
    ),
    Stop(
        "ResNet",
        "the same network at constant depth, to compare with",
        "resnet/digits_resnet.yaml",
    ),
    Stop(
        "BranchyNet",
        "exits: a branch answers when its entropy says that it is sure",
        "branchynet/digits_lenet.yaml",
    ),
)
"""The longest first, so that no core waits at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/tour"), help="folder of the runs and the page"
    )


def run(arguments: argparse.Namespace) -> None:
    """Trains what is not trained yet, and writes the page.

    Raises:
        ValueError: a run did not end well; names its log.
        OSError: the folder cannot be written.
    """
    folder = arguments.dir
    folder.mkdir(parents=True, exist_ok=True)
    check_out(folder / "report", "--dir")  # before minutes of training
    console = Console()
    console.print(
        f"Six methods on 1,797 handwritten digits, {num_at_once()} at a time; each run is a folder "
        f"in {folder}.\nInterrupt it when you like: the same command goes on."
    )
    Tour(folder, console).travel()
    report.run(argparse.Namespace(runs=[folder], out=folder / "report"))


def num_at_once() -> int:
    return min(len(STOPS), os.cpu_count() or 1)


class Tour:
    """The runs, side by side, and how far they are.

    Args:
        folder: of the runs.
        console: where to show it.
    """

    def __init__(self, folder: Path, console: Console):
        self.folder = folder
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=console
        )
        self.waiting = list(STOPS)
        self.running: dict[Stop, tuple[BaseProcess, TaskID]] = {}

    def travel(self) -> None:
        """Returns when all have ended.

        Raises:
            ValueError: one did not end well.
        """
        try:
            with self.progress:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < num_at_once():
                        self.begin(self.waiting.pop(0))
                    time.sleep(POLLING)
                    for stop in list(self.running):
                        self.look_at(stop)
        finally:
            for process, _ in self.running.values():
                process.kill()
                process.join()

    def run_folder(self, stop: Stop) -> Path:
        method = Path(stop.yaml).parent.name or "stochastic_depth"
        return self.folder / method / Path(stop.yaml).stem / "seed0"

    def begin(self, stop: Stop) -> None:
        path = EXPERIMENTS / stop.yaml
        folder = self.run_folder(stop)
        folder.mkdir(parents=True, exist_ok=True)
        num_epochs = yaml.safe_load(path.read_bytes())["trainer"]["max_epochs"]
        self.progress.console.print(f"[bold]{stop.title}[/bold]: {stop.what}")
        args = ["fit", "-c", str(path), "--run_dir", str(folder), *stop.options]
        quiet = ["--wandb.mode=disabled", "--trainer.enable_progress_bar=false"]
        process = start([*args, *quiet], self.log(stop), num_threads=1)
        self.running[stop] = process, self.progress.add_task(stop.title, total=num_epochs)

    def log(self, stop: Stop) -> Path:
        return self.run_folder(stop) / "output.txt"

    def look_at(self, stop: Stop) -> None:
        process, task = self.running[stop]
        self.progress.update(task, completed=epochs_done(self.run_folder(stop)))
        if process.is_alive():
            return
        process.join()
        del self.running[stop]
        if process.exitcode:
            raise ValueError(
                f"{stop.title} ended with status {process.exitcode}: see {self.log(stop)}, then "
                "repeat the command to go on"
            )
        self.progress.remove_task(task)
        self.progress.console.print(f"{stop.title}: {answer(self.run_folder(stop))}")


def epochs_done(folder: Path) -> int:
    """Returns the number of epochs that a run has finished."""
    return sum("train/acc" in row for row in CSVHistory(folder / "metrics.csv").read())


def answer(folder: Path) -> str:
    """Returns, in words, what a run has reached at its cheapest and at its dearest point."""
    points = sorted(read_run(folder).points, key=lambda point: point.macs)
    if not points:
        raise ValueError(f"{folder} has lost its results: delete that folder, and repeat this")
    ends = [points[0], points[-1]] if len(points) > 1 else points
    return " to ".join(f"{each.test_acc:.2%} at {in_units(each.macs)} MACs" for each in ends)
