"""The result of a run: each operating point with its accuracy and its costs."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from callbacks.sampled_images import SampledTestImages, time_points

RESULT = "operating_points.csv"
AGAIN = "operating_points_again.csv"
BATCH_SIZE = 64  # images per forward pass when time is measured
NUM_ROUNDS = 5
COLUMNS = ("name", "test_acc", "macs", "params", "ms_per_image")


class OperatingPoints(SampledTestImages):
    """After a test, measures every operating point of the module and tells it everywhere.

    Writes `operating_points.csv` in the run folder, logs a W&B table. `print_table` shows it. Time
    is that of batches of 64 images.

    Reads of the module: `operating_points()`, `costs()`, and the logged `test/acc` of the point
    "full" and `test/acc_<name>` of the others.

    Args:
        file_name: file in the run folder.
    """

    def __init__(self, file_name: str = RESULT):
        super().__init__((NUM_ROUNDS + 1) * BATCH_SIZE)
        self.file_name = file_name

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        points = pl_module.operating_points()
        # In the precision that the accuracy was measured in.
        images = self.take_images()
        with trainer.precision_plugin.forward_context():
            milliseconds = time_points(points, images.split(BATCH_SIZE))
            costs = pl_module.costs(images[:1])
        rows = []
        for name in points:
            accuracy = trainer.callback_metrics[
                "test/acc" if name == "full" else f"test/acc_{name}"
            ]
            macs, params = costs[name]
            rows.append((name, accuracy.item(), round(macs), params, milliseconds[name]))
        with Path(trainer.default_root_dir, self.file_name).open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_to_wandb(logger, rows)


def log_to_wandb(logger: WandbLogger, rows: Sequence[tuple]) -> None:
    import wandb  # slow to import, and only those who log to it pay

    table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
    panels = {"operating_points": table}
    if len(rows) > 1:
        panels["acc_against_macs"] = wandb.plot.line(
            table, "macs", "test_acc", title="accuracy against MACs"
        )
    logger.log_metrics(panels)


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
