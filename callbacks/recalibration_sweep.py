"""What BN recalibration is worth, and how many images it takes."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from callbacks.bn_recalibration import training_images
from callbacks.outlets import Column, Table
from networks import SlimmableBatchNorm2d, check_counts, recalibrate

RESULT = "recalibration.csv"


class RecalibrationSweep(Callback):
    """After a test, tests every width again with BN statistics of other origins.

    First with those of the widest, which is what a network has that was not recalibrated; then with
    those of so many training images. Writes `recalibration.csv` in the run folder, prints it, and
    leaves the statistics as they were.

    Reads of the module: `net`, `evaluated_points()`, `calibration_runs()`, `eval_widths`; of the
    data module: `train_epoch()`, `on_after_batch_transfer()`.

    Args:
        num_images: numbers of training images.

    Raises:
        ValueError: a number below 1, a network without shared BNs, or several processes.
    """

    only_observes = True

    def __init__(self, num_images: Sequence[int] = (64, 256, 1024, 4096)):
        check_counts(1, 2**31, num_images=num_images)
        if not num_images:
            raise ValueError("num_images of RecalibrationSweep is []: give one number or more")
        self.num_images = list(dict.fromkeys(num_images))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not shared_norms(pl_module):
            raise ValueError(
                f"RecalibrationSweep has nothing to recalibrate of {type(pl_module).__name__}: "
                "remove it from trainer.callbacks"
            )
        if trainer.world_size > 1:
            raise ValueError("RecalibrationSweep runs in one process: set trainer.devices to 1")

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net, points = pl_module.net, pl_module.evaluated_points()
        norms = shared_norms(pl_module)
        before = [norm.statistics for norm in norms]
        results = {}
        with trainer.precision_plugin.forward_context():
            widest = net.width(max(pl_module.eval_widths)).name
            for norm, statistics in zip(norms, before, strict=True):
                norm.statistics = {
                    name: statistics[widest][:, : values.shape[1]]
                    for name, values in statistics.items()
                }
            results["of the widest"] = measure(trainer, pl_module)
            for number in self.num_images:
                images = training_images(trainer, pl_module.device, number)
                recalibrate(net, images, pl_module.calibration_runs(points))
                results[f"{number} images"] = measure(trainer, pl_module)
        for norm, statistics in zip(norms, before, strict=True):
            norm.statistics = statistics
        columns = [Column("name", "name"), *(Column(key, key, ".2%") for key in results)]
        rows = [[name, *(result[name] for result in results.values())] for name in points]
        table = Table(columns, rows)
        table.write(Path(trainer.default_root_dir, RESULT))
        table.show("test accuracy by origin of the BN statistics")


def shared_norms(module: LightningModule) -> list[SlimmableBatchNorm2d]:
    return [norm for norm in module.net.modules() if isinstance(norm, SlimmableBatchNorm2d)]


def measure(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """Returns the test accuracy of every operating point."""
    points = module.evaluated_points()
    right, num_images = dict.fromkeys(points, 0), 0
    for batch in islice(trainer.test_dataloaders, trainer.num_test_batches[0]):
        batch = [values.to(module.device) for values in batch]
        images, labels = trainer.datamodule.on_after_batch_transfer(batch, 0)
        num_images += len(labels)
        for name, classify in points.items():
            right[name] += (classify(images).argmax(1) == labels).sum().item()
    return {name: count / num_images for name, count in right.items()}
