"""The result of a run: each operating point with its accuracy and its costs."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from callbacks import Column, SampledTestImages, Table, log_panels
from lightning_modules import accuracy_name
from networks import NUM_TIMED_ROUNDS, TIMED_BATCH_SIZE, time_points

NAME = "operating_points"
RESULT, AGAIN = f"{NAME}.csv", f"{NAME}_again.csv"
COLUMNS = (
    Column("name", "name"),
    Column("test_acc", "test accuracy", ".2%"),
    Column("macs", "MACs", ",.0f"),
    Column("params", "parameters", ",.0f"),
    Column("ms_per_image", "ms per image", ".3f"),
)


class OperatingPoints(SampledTestImages):
    """After a test, measures every operating point of the module and tells it everywhere.

    Writes `operating_points.csv` in the run folder, or `operating_points_again.csv` (see
    `SampledTestImages`), and logs a W&B table. `show_points` prints either. Time is that of batches
    of 64 images.

    Reads of the module: `operating_points()`, `costs()`, and the accuracies that it logs.
    """

    def __init__(self) -> None:
        super().__init__((NUM_TIMED_ROUNDS + 1) * TIMED_BATCH_SIZE)

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        points = pl_module.operating_points()
        # In the precision that the accuracy was measured in.
        images = self.take_images()
        with trainer.precision_plugin.forward_context():
            milliseconds = time_points(points, images.split(TIMED_BATCH_SIZE))
            costs = pl_module.costs(images[:1])
        rows = []
        for name in points:
            accuracy = trainer.callback_metrics[accuracy_name("test", name)].item()
            macs, params = costs[name]
            rows.append((name, accuracy, round(macs), params, milliseconds[name]))
        table = Table(COLUMNS, rows)
        table.write(self.path(trainer, NAME))
        log_panels(trainer, lambda wandb: panels(wandb, table))


def panels(wandb: Any, table: Table) -> dict[str, Any]:
    """Returns the table of operating points and, of several, accuracy against MACs."""
    content = table.to_wandb()
    if len(table.rows) == 1:
        return {NAME: content}
    title = "accuracy against MACs"
    curve = wandb.plot.line(content, "macs", "test_acc", title=title)
    return {NAME: content, "acc_against_macs": curve}


def show_points(path: Path) -> None:
    """Prints the operating points that a file holds; nothing if nothing was tested."""
    if path.exists():
        Table.read(path, COLUMNS).show("operating points")
