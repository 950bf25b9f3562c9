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

RESULT = "operating_points.csv"
AGAIN = "operating_points_again.csv"
BATCH_SIZE = 64  # images per forward pass when time is measured
NUM_ROUNDS = 5  # timed passes of each point, in turn; the median counts
COLUMNS = ("name", "test_acc", "macs", "params", "ms_per_image")


class OperatingPoints(Callback):
    """After a test, measures every operating point of the module and tells it everywhere.

    Writes `operating_points.csv` in the run folder, logs a W&B table. `print_table` shows it.

    Reads of the module: `operating_points()`, `net`, and the logged `test/acc` of the point "full"
    and `test/acc_<name>` of the others.

    Args:
        file_name: file in the run folder.
    """

    def __init__(self, file_name: str = RESULT):
        self.file_name = file_name
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
            self.images = batch[0][:BATCH_SIZE]

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        points = pl_module.operating_points()
        # In the precision that the accuracy was measured in.
        with trainer.precision_plugin.forward_context():
            milliseconds = time_points(points, self.images)
            macs = {name: count_macs(run, self.images[:1]) for name, run in points.items()}
        rows = []
        for name in points:
            accuracy = trainer.callback_metrics[
                "test/acc" if name == "full" else f"test/acc_{name}"
            ]
            params = count_params(pl_module.net)
            rows.append((name, accuracy.item(), macs[name], params, milliseconds[name]))
        with Path(trainer.default_root_dir, self.file_name).open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                data = [list(row) for row in rows]
                logger.log_table("operating_points", columns=list(COLUMNS), data=data)


def time_points(
    points: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor
) -> dict[str, float]:
    """Returns the median milliseconds per image of each point; the points take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in points}
    for number in range(NUM_ROUNDS + 1):
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


def print_table(path: Path) -> None:
    """Prints the operating points that a file holds; nothing if nothing was tested."""
    if not path.exists():
        return
    table = Table(title="operating points")
    for title in ("name", "test accuracy", "MACs", "parameters", "ms per image"):
        table.add_column(title, justify="left" if title == "name" else "right")
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            table.add_row(
                row["name"],
                f"{float(row['test_acc']):.2%}",
                f"{int(row['macs']):,}",
                f"{int(row['params']):,}",
                f"{float(row['ms_per_image']):.3f}",
            )
    Console().print(table)
