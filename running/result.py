"""The result of a run: each operating point with what is measured of it, and its costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from callbacks import (
    Column,
    SampledTestImages,
    Table,
    class_names,
    log_panels,
    result_file,
)
from lightning_modules import accuracy_name
from networks import NUM_TIMED_ROUNDS, TIMED_BATCH_SIZE, time_points
from running.tracking import trackers_of

FILES = NAME, CLASSES, CONFUSION = "operating_points", "class_accuracy", "confusion"
COLUMNS = (
    Column("name", "name"),
    Column("test_acc", "accuracy", ".2%"),
    Column("macs", "MACs", ",.0f"),
    Column("params", "parameters", ",.0f"),
    Column("ms_per_image", "ms/image", ".3f"),
    Column("test_top5", "top-5", ".2%", is_extra=True),
    Column("ece", "ECE", ".3f", is_extra=True),
)


class OperatingPoints(SampledTestImages):
    """After a test, measures every operating point of the module and tells it everywhere.

    Writes in the run folder, in files whose names end in `_again` if `SampledTestImages` says so:

        operating_points.csv  accuracies, costs and expected calibration error (see `PointAnswers`);
                              top-5 accuracy if there are more than 5 classes
        class_accuracy.csv    accuracy of every point on the images of each class
        confusion.csv         how many images of a class were taken for which, where there are any

    `show_points` prints the first. In W&B: a table of it, and in the run's summary
    `point/<name>/<column>`, by which runs can be compared. Time is that of batches of 64 images.

    Reads of the module: `operating_points()`, `costs()`, `test_answers`, `net.num_classes`, and the
    accuracies that it logs; of the data module: `class_names`, for which numbers stand in.
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
        answers, num_classes = pl_module.test_answers, pl_module.net.num_classes
        columns = [each for each in COLUMNS if each.key != "test_top5" or num_classes > 5]
        rows = []
        for name in points:
            accuracy = trainer.callback_metrics[accuracy_name("test", name)].item()
            macs, params = costs[name]
            row = [name, accuracy, round(macs), params, milliseconds[name]]
            top5 = [answers[name].top5] if num_classes > 5 else []
            rows.append([*row, *top5, answers[name].ece])
        table = Table(columns, rows)
        table.write(self.path(trainer, NAME))
        names = class_names(trainer, num_classes)
        confusions = {name: answers[name].confusion(num_classes) for name in points}
        class_accuracies(confusions, names).write(self.path(trainer, CLASSES))
        confusion_table(confusions, names).write(self.path(trainer, CONFUSION))
        tell_wandb(trainer, table)


def class_accuracies(confusions: Mapping[str, Tensor], names: Sequence[Any]) -> Table:
    """Returns the accuracy of every point on the images of each class; empty without images."""
    rows = []
    for point, confusion in confusions.items():
        counts, right = confusion.sum(1).tolist(), confusion.diag().tolist()
        rows += [
            (point, names[label], number, right[label] / number if number else None)
            for label, number in enumerate(counts)
        ]
    return Table(("point", "class", "num_images", "acc"), rows)


def confusion_table(confusions: Mapping[str, Tensor], names: Sequence[Any]) -> Table:
    """Returns, by point, true and predicted class, the numbers of images that are not 0."""
    rows = [
        (point, names[true], names[predicted], confusion[true, predicted].item())
        for point, confusion in confusions.items()
        for true, predicted in confusion.nonzero().tolist()
    ]
    return Table(("point", "true", "predicted", "num_images"), rows)


def tell_wandb(trainer: Trainer, table: Table) -> None:
    """Gives W&B the operating points, as a table and as numbers in the run's summary."""
    log_panels(trainer, lambda wandb: panels(wandb, table))
    numbers = {
        f"point/{name}/{key}": value
        for name, *values in table.rows
        for key, value in zip(table.keys[1:], values, strict=True)
    }
    for tracker in trackers_of(trainer.loggers):
        tracker.summarize(numbers)


def panels(wandb: Any, table: Table) -> dict[str, Any]:
    """Returns the table of operating points and, of several, accuracy against MACs."""
    content = table.to_wandb()
    if len(table.rows) == 1:
        return {NAME: content}
    title = "accuracy against MACs"
    curve = wandb.plot.line(content, "macs", "test_acc", title=title)
    return {NAME: content, "acc_against_macs": curve}


def result_files(folder: Path, again: bool) -> list[Path]:
    """Returns the files that a test writes, that of `show_points` first."""
    return [result_file(folder, name, again) for name in FILES]


def show_points(path: Path) -> None:
    """Prints the operating points that a file holds; nothing if nothing was tested."""
    if path.exists():
        Table.read(path, COLUMNS).show("operating points on the test set")
