"""The result of a run: each operating point with its accuracy and its costs."""

import csv
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor

from networks import count_macs, count_params

FILE = "operating_points.csv"
COLUMNS = ("name", "test_acc", "macs", "params", "ms_per_image")


class OperatingPoints(Callback):
    """After a test, measures every operating point of the module and tells it everywhere.

    Prints a table, writes `operating_points.csv` in the run folder, logs a W&B table.

    Reads of the module: `operating_points()`, `net`, and the logged `test/acc` of the point "full"
    and
    `test/acc_<name>` of the others.

    Args:
        batch_size: images per forward pass when time is measured.
        num_rounds: timed passes of each point, in turn; the median counts.
    """

    def __init__(self, batch_size: int = 64, num_rounds: int = 5):
        self.batch_size = batch_size
        self.num_rounds = num_rounds
        self.images: Tensor | None = None

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self.images = batch[0][: self.batch_size]

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        points = pl_module.operating_points()
        milliseconds = time_points(points, self.images, self.num_rounds)
        rows = []
        for name, classify in points.items():
            accuracy = trainer.callback_metrics[
                "test/acc" if name == "full" else f"test/acc_{name}"
            ]
            macs = count_macs(classify, self.images[:1])
            params = count_params(pl_module.net)
            rows.append((name, accuracy.item(), macs, params, milliseconds[name]))
        with Path(trainer.default_root_dir, FILE).open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(
                    "operating_points", columns=list(COLUMNS), data=[list(row) for row in rows]
                )
        print_table(Path(trainer.default_root_dir))


def time_points(
    points: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, num_rounds: int
) -> dict[str, float]:
    """Returns the median milliseconds per image of each point; the points take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in points}
    for number in range(num_rounds + 1):
        for name, classify in points.items():
            synchronize(images)
            start = time.perf_counter()
            classify(images)
            synchronize(images)
            if number > 0:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) / len(images) for name, times in seconds.items()}


def synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def print_table(run_dir: Path) -> None:
    """Prints the operating points that a run folder holds.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    table = Table(title="operating points")
    for title in ("name", "test accuracy", "MACs", "parameters", "ms per image"):
        table.add_column(title, justify="left" if title == "name" else "right")
    with (run_dir / FILE).open(newline="") as file:
        for row in csv.DictReader(file):
            accuracy, macs, params = float(row["test_acc"]), int(row["macs"]), int(row["params"])
            milliseconds = float(row["ms_per_image"])
            table.add_row(
                row["name"], f"{accuracy:.2%}", f"{macs:,}", f"{params:,}", f"{milliseconds:.3f}"
            )
    Console().print(table)
